"""Scores of prompts that begin alike: what they share is computed once, and kept for prompts of later calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.packing import Grown, Prefix, Tree, grow, takes_masks
from icl_markup.prefixes import common
from icl_markup.prompt import Prompt

if TYPE_CHECKING:
    from icl_markup.model import MarkupModel

MOST_PACKED = 512
"""The most tokens that are computed in one sequence: each is compared with all, though it sees its own prompt only."""

MOST_SEEN = 2048
"""The most tokens, computed before or not, in one sequence of several trees."""

LEAST_SHARED = 16
"""Prompts that have fewer tokens in common than this are computed whole."""

LEAST_SHARE = 1 / 8
"""So are those of which this part or less is common, as a batch of whole prompts is the simpler one to compute."""

FEW = 4
"""A prefix of one prompt is kept for later calls where a call has no more than this many such prefixes."""


class Group(NamedTuple):
    """Prompts that begin alike: how they begin, which they are, and whether that is kept for later calls."""

    head: tuple[int, ...]
    members: tuple[int, ...]
    keep: bool


class _Unit(NamedTuple):
    """A tree, the prompt and the option of each of its branches, and whether its beginning is to be kept."""

    tree: Tree
    owners: tuple[tuple[int, int], ...]
    keep: bool = False


def prefix_length(prompt: Prompt) -> int:
    """Return how many ids stand before the first query; its slot is never among them."""
    length = 0
    for piece in prompt.pieces:
        if piece.segment < 0:
            break
        length += len(piece.ids)
    return min(length, prompt.slots[-1].position)


def find_groups(prefixes: Sequence[tuple[int, ...]], known: Iterable[tuple[int, ...]] = ()) -> list[Group]:
    """Group prompts by what they begin with.

    Args:
        prefixes: of each prompt the ids before its query.
        known: prefixes among them that are kept from earlier calls.

    Returns:
        Groups of the prompts that have anything in common with others or with `known`: those of equal prefixes; the
        single ones too, if they are few; of many single ones, neighbours in the order of their ids, as long as
        another makes more tokens common to all.
    """
    known = set(known)
    equal: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prefix in enumerate(prefixes):
        equal[prefix].append(i)
    single = [prefix for prefix, members in equal.items() if len(members) == 1 and prefix not in known]
    if len(single) <= FEW:
        single = []
    groups = [Group(head, tuple(members), True) for head, members in equal.items() if head not in set(single)]
    head: tuple[int, ...] = ()
    members: list[int] = []
    for prefix in [*sorted(single), ()]:
        length = common(head, prefix)
        if members and (length < LEAST_SHARED or length * len(members) < len(head) * (len(members) - 1)):
            groups += [Group(head, tuple(members), True)] if len(members) > 1 else []
            members = []
        head = head[:length] if members else prefix
        members += equal.get(prefix, [])
    return groups


def shared_scores(
    model: MarkupModel, markup: Markup, prompts: Sequence[Prompt], episodes: Sequence[Episode], batch_tokens: int
) -> dict[int, Tensor]:
    """Score prompts of one query each from what they share, with each other and with those of earlier calls.

    Args:
        model: a model with a causal backbone.
        markup: the composer that made the prompts.
        prompts: the prompts.
        episodes: their episodes, one a prompt.
        batch_tokens: the most tokens that are computed at once; a longer beginning or continuation has its own turn.

    Returns:
        By the prompt's number its options' scores, fp32, (options,), on the CPU, the same up to rounding as from the
        whole prompt; without those prompts that are better computed whole, or cannot be computed otherwise.
    """
    with torch.inference_mode():
        return _Call(model, markup, prompts, episodes, batch_tokens).scores()


class _Call:
    """The prompts of one call."""

    def __init__(
        self,
        model: MarkupModel,
        markup: Markup,
        prompts: Sequence[Prompt],
        episodes: Sequence[Episode],
        batch_tokens: int,
    ):
        self.backbone = model.backbone
        self.table = model.table
        self.cache = model.prefixes
        self.normalised = model.length_normalised
        self.prompts = prompts
        self.most = min(batch_tokens, MOST_PACKED)
        self.limit = self.backbone.exactness.limit if takes_masks(self.backbone) else 0  # it may be set anew
        self.names: list[list[tuple[int, ...]]] = [[] for _ in prompts]
        if markup.answers == "names":
            self.names = [
                [markup.name_ids(option.name, prompt.slots[-1].spaced) for option in episode.options]
                for prompt, episode in zip(prompts, episodes, strict=True)
            ]
        if self.limit:
            self.cache.refresh(self.backbone, self.table)

    def scores(self) -> dict[int, Tensor]:
        """Score what can be scored from shared beginnings."""
        found: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for pack in self._packs():
            grown = grow(self.backbone, self.table, [unit.tree for unit in pack])
            for unit, tree in zip(pack, grown, strict=True):
                if unit.keep:
                    self.cache.keep(tree.prefix())
            for owner, score in self._read(pack, grown):
                found[owner[0]][owner[1]] = score
        scores = {i: torch.stack([of[k] for k in range(len(of))]) for i, of in found.items() if self.names[i]}
        return scores | {i: of[0] for i, of in found.items() if not self.names[i]}

    def _groups(self) -> list[Group]:
        fit = [
            i
            for i, prompt in enumerate(self.prompts)
            if len(prompt.ids) + max(map(len, self.names[i]), default=0) <= self.limit
        ]
        prefixes = [self.prompts[i].ids[: prefix_length(self.prompts[i])] for i in fit]
        known = [prefix for prefix in prefixes if prefix in self.cache]
        groups = [
            Group(group.head, tuple(fit[k] for k in group.members), group.keep)
            for group in find_groups(prefixes, known)
        ]
        grouped = {i for group in groups for i in group.members}
        for i, prefix in zip(fit, prefixes, strict=True):
            if i not in grouped:
                past = self.cache.longest(prefix)
                groups.append(Group(past.ids if past else (), (i,), False))
        worthy = []
        for group in groups:
            longest = max(len(self.prompts[i].ids) for i in group.members)
            if len(group.head) >= LEAST_SHARED and len(group.head) > LEAST_SHARE * longest:
                worthy.append(group)
            else:  # the options' names have the prompt in common, whatever prompts have
                worthy += [Group((), (i,), False) for i in group.members if self.names[i]]
        return worthy

    def _past(self, group: Group) -> tuple[Prefix | None, tuple[int, ...]]:
        """Return what is known of a group's head, and the rest; count both."""
        past = self.cache.longest(group.head) if group.head else None
        if past is not None and len(past.ids) < min(LEAST_SHARED, len(group.head)):
            past = None
        rest = group.head[len(past.ids) if past else 0 :]
        counts = self.cache.counts
        counts.hits += bool(group.head) and not rest
        counts.misses += bool(rest)
        counts.computed += len(rest)
        counts.reused += len(group.head) * len(group.members) - len(rest)
        return past, rest

    def _units(self) -> Iterator[_Unit]:
        """Yield trees; beginnings that are not computed together with what follows are computed before."""
        for group in self._groups():
            past, rest = self._past(group)
            if any(self.names[i] for i in group.members):
                past = self._computed(past, rest, group.keep)
                for i in group.members:  # the trunk's last id predicts the first of every name
                    branches = tuple(name[:-1] for name in self.names[i])
                    owners = tuple((i, option) for option in range(len(branches)))
                    yield from self._cut(_Unit(Tree(past, self.prompts[i].ids[len(group.head) :], branches), owners))
            else:
                branches = tuple(self.prompts[i].ids[len(group.head) :] for i in group.members)
                owners = tuple((i, 0) for i in group.members)
                yield from self._cut(_Unit(Tree(past, rest, branches), owners, group.keep and bool(rest)))

    def _computed(self, past: Prefix | None, rest: tuple[int, ...], keep: bool) -> Prefix | None:
        if not rest:
            return past
        prefix = grow(self.backbone, self.table, [Tree(past, rest, ())])[0].prefix()
        if keep:
            self.cache.keep(prefix)
        return prefix

    def _cut(self, unit: _Unit) -> Iterator[_Unit]:
        """Cut a tree that is too large for one sequence; each part computes its trunk anew if that is short."""
        tree, most = unit.tree, min(self.most, self.limit - unit.tree.seen)
        if tree.tokens <= most:
            yield unit
            return
        if unit.keep or len(tree.trunk) > most // 4:
            kept = len(tree.trunk) - bool(self.names[unit.owners[0][0]])  # names are read at the trunk's last id
            past = self._computed(tree.past, tree.trunk[:kept], unit.keep)
            tree = Tree(past, tree.trunk[kept:], tree.branches)
            most = min(self.most, self.limit - tree.seen)
        start, size = 0, len(tree.trunk)
        for end, branch in enumerate(tree.branches):
            if end > start and size + len(branch) > most:
                yield _Unit(tree._replace(branches=tree.branches[start:end]), unit.owners[start:end])
                start, size = end, len(tree.trunk)
            size += len(branch)
        yield _Unit(tree._replace(branches=tree.branches[start:]), unit.owners[start:])

    def _packs(self) -> Iterator[list[_Unit]]:
        """Put trees into sequences, in order."""
        pack: list[_Unit] = []
        tokens, seen = 0, {}
        for unit in self._units():
            tokens += unit.tree.tokens
            seen[id(unit.tree.past)] = unit.tree.seen
            columns = tokens + sum(seen.values())
            if pack and (tokens > self.most or columns > min(MOST_SEEN, self.limit)):
                yield pack
                pack, tokens, seen = [], unit.tree.tokens, {id(unit.tree.past): unit.tree.seen}
            pack.append(unit)
        if pack:
            yield pack

    def _read(self, pack: Sequence[_Unit], grown: Sequence[Grown]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield the scores of a sequence's branches, each with the prompt and the option it belongs to."""
        owners = [owner for unit in pack for owner in unit.owners]
        if self.names[owners[0][0]]:
            yield from zip(owners, self._name_scores(owners, grown), strict=True)
            return
        hidden = [part for tree in grown for part in tree.branches]
        slots = [self.prompts[i].slots[-1] for i, _ in owners]
        lengths = [len(self.prompts[i].ids) for i, _ in owners]
        rows = [part[slot.position - n] for part, slot, n in zip(hidden, slots, lengths, strict=True)]
        most = max(len(slot.candidates) for slot in slots)
        candidates = torch.tensor([[*slot.candidates, *[0] * (most - len(slot.candidates))] for slot in slots])
        logits = self.backbone.logits_at(torch.stack(rows), candidates, torch.ones_like(candidates, dtype=torch.bool))
        for owner, slot, row in zip(owners, slots, logits.cpu(), strict=True):
            yield owner, row[: len(slot.candidates)]

    def _name_scores(self, owners: Sequence[tuple[int, int]], grown: Sequence[Grown]) -> Tensor:
        """Score names behind trunks; the end of a trunk is one place for all of its names."""
        names = [self.names[i][option] for i, option in owners]
        hidden: list[Tensor] = []
        rows: list[int] = []
        place = 0
        for tree in grown:
            hidden += [tree.trunk[-1:], *tree.branches]
            end, place = place, place + 1
            for part in tree.branches:
                rows += [end, *range(place, place + len(part))]
                place += len(part)
        targets = torch.tensor([token for name in names for token in name])
        log_probs = self.backbone.log_probs_at(torch.cat(hidden), targets, torch.tensor(rows))
        parts = log_probs.split([len(name) for name in names])
        return torch.stack([part.mean() if self.normalised else part.sum() for part in parts]).cpu()
