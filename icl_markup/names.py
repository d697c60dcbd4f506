"""Scores whole label names at the slot: for more options than there are symbols, or on request.

A name's score is the log-probability of its tokens given the prompt, summed or averaged over its tokens:
left to right in causal and sequence-to-sequence models; in masked models with all of the name's tokens masked
at once (pseudo-log-likelihood over masks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icl_markup.batching import Batch
from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.prompt import Prompt, Slot
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone


def name_scores(
    backbone: Backbone,
    markup: Markup,
    prompts: Sequence[Prompt],
    episodes: Sequence[Episode],
    table: TagTable | None,
    length_normalised: bool,
) -> Tensor:
    """Score every option's name at every query's slot.

    Args:
        backbone: the frozen model.
        markup: the composer that made the prompts.
        prompts: the prompts.
        episodes: their episodes, one a prompt, whose options are scored.
        table: the tags' soft tokens.
        length_normalised: average over a name's tokens instead of summing.

    Returns:
        fp32, shape (queries, most options); -inf where an episode has fewer options.
    """
    lines: list[tuple[int, ...]] = []
    slots: list[tuple[int, int]] = []
    targets: list[int] = []
    decoder: list[tuple[int, ...]] = []
    owners: list[int] = []
    cells: list[tuple[int, int]] = []
    query = 0
    for prompt, episode in zip(prompts, episodes, strict=True):
        for slot in prompt.slots:
            for option, shown in enumerate(episode.options):
                name = markup.name_ids(shown.name, slot.spaced)
                ids = prompt.ids
                if markup.layout.kind == "masked":
                    ids = _widened(prompt, slot, len(name), markup.layout.mask_id)
                elif markup.layout.kind == "causal":
                    ids = ids + name[:-1]
                else:
                    decoder.append(name[:-1])
                slots += [(len(lines), slot.position + k) for k in range(len(name))]
                owners += [len(cells)] * len(name)
                targets += name
                cells.append((query, option))
                lines.append(ids)
            query += 1
    batch = Batch.of_ids(
        lines,
        slots,
        torch.zeros(len(slots), 1, dtype=torch.long),
        targets=targets,
        pad_id=backbone.tokenizer.pad_token_id or 0,
        decoder_ids=_padded(decoder) if decoder else None,
        length=backbone.padded_length(max(map(len, lines))) if torch.is_grad_enabled() else 0,
    )
    log_probs = backbone.token_log_probs(batch, table)
    owner = torch.tensor(owners, device=log_probs.device)
    sums = torch.zeros(len(cells), device=log_probs.device).index_add(0, owner, log_probs)
    if length_normalised:
        sums = sums / torch.bincount(owner, minlength=len(cells))
    most = max(len(episode.options) for episode in episodes)
    rows, columns = torch.tensor(cells, device=log_probs.device).T
    scores = torch.full((query, most), float("-inf"), device=log_probs.device)
    return scores.index_put((rows, columns), sums)


def _widened(prompt: Prompt, slot: Slot, width: int, mask_id: int) -> tuple[int, ...]:
    """Return a prompt's ids with so many masks in a slot's place."""
    return prompt.ids[: slot.position] + (mask_id,) * width + prompt.ids[slot.position + 1 :]


def _padded(lines: Sequence[Sequence[int]]) -> Tensor:
    # What follows a name's last token is never read, and a causal decoder does not look ahead: any id pads.
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[0] * (longest - len(line))] for line in lines], dtype=torch.long)
