"""Scores whole label names at the slot: for more options than there are symbols, or on request.

A name's score is the log-probability of its tokens given the prompt, summed or averaged over its tokens: left to
right in causal and sequence-to-sequence models; in masked models with all of the name's tokens masked at once
(pseudo-log-likelihood over masks).

The prompts of an episode share one pass: causal backbones read the context once, the queries behind it and the names
behind each query (`icl_markup.branches`); sequence-to-sequence ones read each prompt once (`icl_markup.decoding`). A
masked model, or one that takes no mask and no cache, reads a copy of the prompt for every name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from icl_markup.batching import Batch
from icl_markup.branches import branched_prompts, stacked
from icl_markup.decoding import decoder_states
from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.prompt import Prompt, Slot
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

Name = tuple[int, ...]

LONGEST_BRANCH = 8192
"""The longest prompt that is read as a branch: a mask grows with the square of its length, copies only with it."""


@dataclass(frozen=True)
class NameScores:
    """Scores of names at slots, in the order of the prompts' slots.

    Attributes:
        sums: the sum of the log-probabilities of each name's tokens, fp32, (slots, most options); -inf where an
            episode has fewer options.
        lengths: how many tokens each name has, the same shape; 1 where there is no option.
    """

    sums: Tensor
    lengths: Tensor


class _Query(NamedTuple):
    """A slot of a prompt, and the names that may answer it."""

    prompt: Prompt
    slot: Slot
    names: tuple[Name, ...]


def name_scores(
    backbone: Backbone, markup: Markup, prompts: Sequence[Prompt], episodes: Sequence[Episode], table: TagTable | None
) -> NameScores:
    """Score every option's name at every query's slot.

    Args:
        backbone: the frozen model.
        markup: the composer that made the prompts.
        prompts: the prompts.
        episodes: their episodes, one for each prompt, whose options are scored. Neighbors that are one and the same
            object share a pass if the backbone can.
        table: the tags' soft tokens.
    """
    groups = [
        [_Query(prompt, slot, _names(markup, episode, slot)) for prompt in members for slot in prompt.slots]
        for episode, members in _by_episode(prompts, episodes)
    ]
    flat = [query for group in groups for query in group]
    if backbone.kind == "seq2seq" and backbone.shares_names:
        reading = _decoded(backbone, flat, table)
    elif backbone.kind == "causal" and all(branches_fit(backbone, group) for group in groups):
        reading = _branched(backbone, groups, table)
    else:
        reading = _copied(backbone, flat, table)
    return _scored(backbone, flat, reading)


def name_tokens(backbone: Backbone, markup: Markup, prompts: Sequence[Prompt], episode: Episode) -> int:
    """Return how many tokens `name_scores` computes for an episode's prompts, which it computes together.

    For sequence-to-sequence models also what copies of keys and values take, in tokens: batches are cut by this number.
    """
    queries = [_Query(prompt, slot, _names(markup, episode, slot)) for prompt in prompts for slot in prompt.slots]
    if backbone.kind == "causal" and branches_fit(backbone, queries):
        return len(branched_prompts(prompts, [query.names for query in queries]).sequence.ids)
    if backbone.kind == "seq2seq" and backbone.shares_names:
        # Each name has a copy of the keys and values of its prompt, an eighth or so of what a token keeps in training.
        return sum(len(query.prompt.ids) * (8 + len(query.names)) // 8 for query in queries)
    return sum(len(query.prompt.ids) * len(query.names) for query in queries)


def branches_fit(backbone: Backbone, queries: Sequence[_Query]) -> bool:
    """Return whether a causal backbone answers these prompts as branches of one sequence as it does one by one."""
    if not backbone.shares_names:
        return False
    longest = max(len(query.prompt.ids) + max(map(len, query.names)) for query in queries)
    return longest <= min(backbone.exactness.limit, LONGEST_BRANCH)


def _names(markup: Markup, episode: Episode, slot: Slot) -> tuple[Name, ...]:
    return tuple(markup.name_ids(option.name, slot.spaced) for option in episode.options)


def _by_episode(prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> Iterator[tuple[Episode, list[Prompt]]]:
    members: list[Prompt] = []
    for i, (prompt, episode) in enumerate(zip(prompts, episodes, strict=True)):
        members.append(prompt)
        if i + 1 == len(episodes) or episodes[i + 1] is not episode:
            yield episode, members
            members = []


@dataclass(frozen=True)
class _Reading:
    """What the head is given at some places, and the places that predict the tokens of each name of each query."""

    hidden: Tensor
    reads: list[tuple[tuple[int, ...], ...]]


def _branched(backbone: Backbone, groups: Sequence[Sequence[_Query]], table: TagTable | None) -> _Reading:
    """Read the queries of each group as branches of one sequence."""
    written = [branched_prompts([q.prompt for q in group], [q.names for q in group]) for group in groups]
    sequences = [one.sequence for one in written]
    longest = max(len(sequence.ids) for sequence in sequences)
    positions, visible = stacked(sequences, longest)
    places: dict[tuple[int, int], int] = {}
    reads = [
        tuple(tuple(places.setdefault((row, place), len(places)) for place in name) for name in query)
        for row, one in enumerate(written)
        for query in one.reads
    ]
    batch = Batch.of_ids(
        [sequence.ids for sequence in sequences],
        list(places),
        torch.zeros(len(places), 1, dtype=torch.long),
        pad_id=backbone.tokenizer.pad_token_id or 0,
        position_ids=positions,
        visible=visible,
    )
    return _Reading(backbone.slot_states(batch, table), reads)


def _decoded(backbone: Backbone, queries: Sequence[_Query], table: TagTable | None) -> _Reading:
    """Read each prompt once with the encoder, and every name with the decoder behind it."""
    batch = Batch.of_ids(
        [query.prompt.ids for query in queries],
        [],
        torch.zeros(0, 1, dtype=torch.long),
        pad_id=backbone.tokenizer.pad_token_id or 0,
    )
    tails: dict[tuple[int, Name], int] = {}
    for row, query in enumerate(queries):
        for name in query.names:
            if len(name) > 1:
                tails.setdefault((row, name[:-1]), len(tails))
    first, states = decoder_states(backbone, batch, [tail for _, tail in tails], [row for row, _ in tails], table)
    hidden, width = first, 0
    if states is not None:
        hidden, width = torch.cat([first, states.flatten(0, 1)]), states.shape[1]
    reads = [
        tuple(
            (row, *(len(queries) + tails[row, name[:-1]] * width + k for k in range(len(name) - 1)))
            for name in query.names
        )
        for row, query in enumerate(queries)
    ]
    return _Reading(hidden, reads)


def _copied(backbone: Backbone, queries: Sequence[_Query], table: TagTable | None) -> _Reading:
    """Read a copy of the prompt for every name."""
    lines: list[Name] = []
    slots: list[tuple[int, int]] = []
    decoder: list[Name] = []
    reads = []
    for query in queries:
        places = []
        for name in query.names:
            first = query.slot.position
            places.append(tuple(range(len(slots), len(slots) + len(name))))
            slots += [(len(lines), first + k) for k in range(len(name))]
            ids = query.prompt.ids
            if backbone.kind == "masked":
                ids = ids[:first] + (ids[first],) * len(name) + ids[first + 1 :]
            elif backbone.kind == "causal":
                ids = ids + name[:-1]
            else:
                decoder.append(name[:-1])
            lines.append(ids)
        reads.append(tuple(places))
    batch = Batch.of_ids(
        lines,
        slots,
        torch.zeros(len(slots), 1, dtype=torch.long),
        pad_id=backbone.tokenizer.pad_token_id or 0,
        decoder_ids=_padded(decoder) if decoder else None,
    )
    return _Reading(backbone.slot_states(batch, table), reads)


def _scored(backbone: Backbone, queries: Sequence[_Query], reading: _Reading) -> NameScores:
    """Add up the log-probabilities of names' tokens."""
    at = [place for query in reading.reads for name in query for place in name]
    targets = [token for query in queries for name in query.names for token in name]
    sizes = torch.tensor([len(name) for query in queries for name in query.names])
    device = reading.hidden.device
    log_probs = backbone.log_probs_at(reading.hidden, torch.tensor(targets), torch.tensor(at))
    owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
    sums = torch.zeros(len(sizes), device=device).index_add(0, owner, log_probs)
    most = max(len(query.names) for query in queries)
    cells = [(row, column) for row, query in enumerate(queries) for column in range(len(query.names))]
    rows, columns = torch.tensor(cells, device=device).T
    shape = (len(queries), most)
    scores = torch.full(shape, float("-inf"), device=device).index_put((rows, columns), sums)
    lengths = torch.ones(shape, device=device).index_put((rows, columns), sizes.to(device, torch.float32))
    return NameScores(scores, lengths)


def _padded(lines: Sequence[Sequence[int]]) -> Tensor:
    # What follows a name's last token is never read, and a causal decoder does not look ahead: any id pads.
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[0] * (longest - len(line))] for line in lines], dtype=torch.long)
