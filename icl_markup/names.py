"""Scores whole label names at the slot: for more options than there are symbols, or on request.

A name's score is the log-probability of its tokens given the prompt, summed or averaged over its tokens:
left to right in causal and sequence-to-sequence models; in masked models with all of the name's tokens masked
at once (pseudo-log-likelihood over masks).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
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


def name_copies(backbone: Backbone, markup: Markup, episode: Episode) -> int:
    """Return how many copies of an episode's prompt of one query, or of queries that share one, `name_scores` reads."""
    if backbone.local_layers:
        return len({len(markup.name_ids(option.name)) for option in episode.options})
    return len(episode.options)


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
    segments: list[tuple[int, ...]] = []
    slots: list[tuple[int, int]] = []
    targets: list[int] = []
    decoder: list[tuple[int, ...]] = []
    owners: list[int] = []
    cells: list[tuple[int, int]] = []
    query = 0
    for prompt, episode in zip(prompts, episodes, strict=True):
        # Where queries do not see each other, all of a prompt are answered at once; and where a name is nothing but
        # masks, names of one length have one prompt.
        known: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        for asked in [prompt.slots] if backbone.local_layers else [(slot,) for slot in prompt.slots]:
            for option, shown in enumerate(episode.options):
                names = [markup.name_ids(shown.name, slot.spaced) for slot in asked]
                lengths = tuple(map(len, names))
                if lengths in known and backbone.local_layers:
                    row, firsts = known[lengths]
                else:
                    row, firsts = len(lines), [slot.position for slot in asked]
                    ids, parts = prompt.ids, prompt.segments
                    if markup.layout.kind == "masked":
                        ids, parts, firsts = _widened(prompt, asked, lengths, markup.layout.mask_id)
                    elif markup.layout.kind == "causal":
                        ids = ids + names[0][:-1]
                        parts = parts + (parts[-1],) * (lengths[0] - 1)
                    else:
                        decoder.append(names[0][:-1])
                    lines.append(ids)
                    segments.append(parts)
                    known[lengths] = row, firsts
                for number, (name, first) in enumerate(zip(names, firsts, strict=True)):
                    slots += [(row, first + k) for k in range(len(name))]
                    owners += [len(cells)] * len(name)
                    targets += name
                    cells.append((query + number, option))
            query += len(asked)
    batch = Batch.of_ids(
        lines,
        slots,
        torch.zeros(len(slots), 1, dtype=torch.long),
        targets=targets,
        pad_id=backbone.tokenizer.pad_token_id or 0,
        decoder_ids=_padded(decoder) if decoder else None,
        segments=segments,
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


def _widened(
    prompt: Prompt, slots: Sequence[Slot], widths: Sequence[int], mask_id: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Return a prompt's ids and segments with so many masks at slots, and where those begin."""
    ids: list[Sequence[int]] = []
    segments: list[Sequence[int]] = []
    firsts: list[int] = []
    copied, added = 0, 0
    for slot, width in zip(slots, widths, strict=True):
        ids += prompt.ids[copied : slot.position], (mask_id,) * width
        segments += prompt.segments[copied : slot.position], (prompt.segments[slot.position],) * width
        firsts.append(slot.position + added)
        copied, added = slot.position + 1, added + width - 1
    ids.append(prompt.ids[copied:])
    segments.append(prompt.segments[copied:])
    return tuple(chain(*ids)), tuple(chain(*segments)), firsts


def _padded(lines: Sequence[Sequence[int]]) -> Tensor:
    # What follows a name's last token is never read, and a causal decoder does not look ahead: any id pads.
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[0] * (longest - len(line))] for line in lines], dtype=torch.long)
