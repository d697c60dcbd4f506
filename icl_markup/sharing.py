"""Scores of prompts that begin alike: what they share is computed once, and kept for prompts of later calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from icl_markup.branches import common
from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.packing import TRUNK, Grown, Prefix, Tree, grow, takes_masks
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


class _Twig(NamedTuple):
    """What a prompt adds to what it begins with.

    Attributes:
        owner: the prompt's number.
        stem: its ids behind the beginning, its slot among them.
        names: the ids of each name that may answer it, without the last; none where symbols answer.
        first: the number of the first of these among the prompt's options.
    """

    owner: int
    stem: tuple[int, ...]
    names: tuple[tuple[int, ...], ...] = ()
    first: int = 0

    @property
    def tokens(self) -> int:
        """The number of ids."""
        return len(self.stem) + sum(map(len, self.names))


class _Unit(NamedTuple):
    """A beginning, what prompts add to it, and whether it is to be kept."""

    past: Prefix | None
    trunk: tuple[int, ...]
    twigs: tuple[_Twig, ...]
    keep: bool = False

    @property
    def tree(self) -> Tree:
        """The beginning with stems behind it, and names behind each stem."""
        branches: list[tuple[int, ...]] = []
        parents: list[int] = []
        for twig in self.twigs:
            parents += [TRUNK, *[len(branches)] * len(twig.names)]
            branches += [twig.stem, *twig.names]
        return Tree(self.past, self.trunk, tuple(branches), tuple(parents))


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
        found: dict[int, list[Tensor]] = defaultdict(list)  # names of one prompt may come in parts, in order
        for pack in self._packs():
            grown = grow(self.backbone, self.table, [unit.tree for unit in pack])
            for unit, tree in zip(pack, grown, strict=True):
                if unit.keep:
                    self.cache.keep(tree.prefix())
            for owner, scores in self._read(pack, grown):
                found[owner].append(scores)
        return {i: torch.cat(parts) for i, parts in found.items()}

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
        """Yield beginnings with what follows, no more of it than goes into one sequence."""
        for group in self._groups():
            past, rest = self._past(group)
            twigs = [
                _Twig(i, self.prompts[i].ids[len(group.head) :], tuple(name[:-1] for name in self.names[i]))
                for i in group.members
            ]
            yield from self._cut(_Unit(past, rest, tuple(twigs), group.keep and bool(rest)))

    def _computed(self, past: Prefix | None, rest: tuple[int, ...], keep: bool) -> Prefix | None:
        if not rest:
            return past
        prefix = grow(self.backbone, self.table, [Tree(past, rest, ())])[0].prefix()
        if keep:
            self.cache.keep(prefix)
        return prefix

    def _cut(self, unit: _Unit) -> Iterator[_Unit]:
        """Cut what is too large for one sequence; each part computes the trunk anew if that is short."""
        most = self._room(unit.past)
        if unit.tree.tokens <= most:
            yield unit
            return
        past, trunk, twigs, keep = unit
        if keep or len(trunk) > most // 4:
            past, trunk = self._computed(past, trunk, keep), ()
            most = self._room(past)
        waiting: list[_Twig] = []
        size = len(trunk)
        for twig in twigs:
            if waiting and size + twig.tokens > most:
                yield _Unit(past, trunk, tuple(waiting))
                waiting, size = [], len(trunk)
            if twig.names and size + twig.tokens > most:  # a prompt by itself
                yield from self._cut_names(past, trunk, twig)
                continue
            waiting.append(twig)
            size += twig.tokens
        if waiting:
            yield _Unit(past, trunk, tuple(waiting))

    def _cut_names(self, past: Prefix | None, trunk: tuple[int, ...], twig: _Twig) -> Iterator[_Unit]:
        """Cut one prompt between its names; the last id of its stem predicts their first tokens, in every part."""
        stem = trunk + twig.stem
        if len(stem) > self._room(past) // 4:
            past, stem = self._computed(past, stem[:-1], False), stem[-1:]
        most = self._room(past)
        start, size = 0, len(stem)
        for end, name in enumerate(twig.names):
            if end > start and size + len(name) > most:
                yield _Unit(past, (), (_Twig(twig.owner, stem, twig.names[start:end], start),))
                start, size = end, len(stem)
            size += len(name)
        yield _Unit(past, (), (_Twig(twig.owner, stem, twig.names[start:], start),))

    def _room(self, past: Prefix | None) -> int:
        """Return how many ids may be computed in one sequence behind a beginning."""
        return min(self.most, self.limit - (len(past.ids) if past else 0))

    def _packs(self) -> Iterator[list[_Unit]]:
        """Put trees into sequences, in order."""
        pack: list[_Unit] = []
        tokens, seen = 0, {}
        for unit in self._units():
            tree = unit.tree
            tokens += tree.tokens
            seen[id(unit.past)] = tree.seen
            columns = tokens + sum(seen.values())
            if pack and (tokens > self.most or columns > min(MOST_SEEN, self.limit)):
                yield pack
                pack, tokens, seen = [], tree.tokens, {id(unit.past): tree.seen}
            pack.append(unit)
        if pack:
            yield pack

    def _read(self, pack: Sequence[_Unit], grown: Sequence[Grown]) -> Iterator[tuple[int, Tensor]]:
        """Yield what each twig of a sequence was given: the number of its prompt, and its options' scores."""
        read: list[tuple[_Twig, Tensor, list[Tensor]]] = []
        for unit, tree in zip(pack, grown, strict=True):
            parts = iter(tree.branches)
            for twig in unit.twigs:
                read.append((twig, next(parts), [next(parts) for _ in twig.names]))
        if self.names[read[0][0].owner]:
            yield from self._name_scores(read)
            return
        slots = [self.prompts[twig.owner].slots[-1] for twig, _, _ in read]
        rows = [
            stem[slot.position - len(self.prompts[twig.owner].ids)]
            for (twig, stem, _), slot in zip(read, slots, strict=True)
        ]
        most = max(len(slot.candidates) for slot in slots)
        candidates = torch.tensor([[*slot.candidates, *[0] * (most - len(slot.candidates))] for slot in slots])
        logits = self.backbone.logits_at(torch.stack(rows), candidates, torch.ones_like(candidates, dtype=torch.bool))
        for (twig, _, _), slot, row in zip(read, slots, logits.cpu(), strict=True):
            yield twig.owner, row[: len(slot.candidates)]

    def _name_scores(self, read: Sequence[tuple[_Twig, Tensor, list[Tensor]]]) -> Iterator[tuple[int, Tensor]]:
        """Score names behind stems; the end of a stem is one place for the first tokens of all of its names."""
        hidden: list[Tensor] = []
        rows: list[int] = []
        targets: list[int] = []
        sizes: list[int] = []
        place = 0
        for twig, stem, parts in read:
            hidden += [stem[-1:], *parts]
            end, place = place, place + 1
            names = self.names[twig.owner][twig.first : twig.first + len(twig.names)]
            for name in names:
                rows += [end, *range(place, place + len(name) - 1)]
                place += len(name) - 1
                targets += name
                sizes.append(len(name))
        log_probs = self.backbone.log_probs_at(torch.cat(hidden), torch.tensor(targets), torch.tensor(rows))
        scores = torch.stack([x.mean() if self.normalised else x.sum() for x in log_probs.split(sizes)]).cpu()
        shares = scores.split([len(twig.names) for twig, _, _ in read])
        for (twig, _, _), share in zip(read, shares, strict=True):
            yield twig.owner, share
