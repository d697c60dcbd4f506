"""Prompts of one episode as branches of one sequence: what they share is computed once, with gradients.

The context (options and demonstrations) stands first, behind it the rest of every query's prompt, and behind each of
those the names that are scored. A mask lets a token see what stands before it in its own prompt only; positions go on
from each branch's own parent. So every token has the states that it would have in a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from icl_markup.prompt import Prompt

_NO_PARENT = -1


@dataclass
class BranchedSequence:
    """A tree of token ids, written as one sequence.

    Attributes:
        ids: the ids, those of a branch after those of its parent.
        positions: the position of each id in its own prompt.
        branches: the branch of each id.
        parents: the parent of each branch; -1 for one that begins a prompt.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)
    """The position after each branch's last id."""

    def add(self, ids: Sequence[int], parent: int = _NO_PARENT, start: int = 0) -> int:
        """Add a branch and return its number; one without a parent begins at the position `start`."""
        first = start if parent == _NO_PARENT else self._ends[parent]
        number = len(self.parents)
        self.ids += ids
        self.positions += range(first, first + len(ids))
        self.branches += [number] * len(ids)
        self.parents.append(parent)
        self._ends.append(first + len(ids))
        return number

    @property
    def depth(self) -> int:
        """The length of the longest prompt in the tree."""
        return max(self._ends)

    def visible(self, length: int) -> Tensor:
        """Return which id sees which: bool, (length, length); ids beyond the last see themselves alone."""
        count = len(self.parents)
        above = torch.eye(count + 1, dtype=torch.bool)
        for branch, parent in enumerate(self.parents):
            if parent != _NO_PARENT:
                above[branch] |= above[parent]
        of = torch.full((length,), count)
        of[: len(self.ids)] = torch.tensor(self.branches)
        seen = above[of[:, None], of].tril_()
        seen[len(self.ids) :] = False
        return seen.fill_diagonal_(True)


@dataclass(frozen=True)
class BranchedPrompts:
    """Prompts of one episode in one sequence, with the names behind them.

    Attributes:
        sequence: the sequence.
        reads: for each prompt and each of its names the places in the sequence whose output predicts the name's tokens.
    """

    sequence: BranchedSequence
    reads: tuple[tuple[tuple[int, ...], ...], ...]


def branched_prompts(prompts: Sequence[Prompt], names: Sequence[Sequence[Sequence[int]]]) -> BranchedPrompts:
    """Write prompts of a causal backbone that begin alike as one sequence.

    Args:
        prompts: one query each, read at their last id.
        names: for each prompt the ids of the names to score behind it.
    """
    shared = min(len(prompt.ids) for prompt in prompts) - 1
    for prompt in prompts[1:]:
        shared = min(shared, common(prompts[0].ids, prompt.ids))
    sequence = BranchedSequence()
    trunk = sequence.add(prompts[0].ids[:shared])
    reads = []
    for prompt, asked in zip(prompts, names, strict=True):
        stem = sequence.add(prompt.ids[shared:], trunk)
        last = len(sequence.ids) - 1
        places = []
        for name in asked:
            start = len(sequence.ids)
            sequence.add(name[:-1], stem)
            places.append((last, *range(start, start + len(name) - 1)))
        reads.append(tuple(places))
    return BranchedPrompts(sequence, tuple(reads))


def stacked(sequences: Iterable[BranchedSequence], length: int) -> tuple[Tensor, Tensor]:
    """Return positions (sequences, length), int64, and what sees what, (sequences, length, length), bool."""
    rows = list(sequences)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    for row, sequence in enumerate(rows):
        positions[row, : len(sequence.ids)] = torch.tensor(sequence.positions)
    return positions, torch.stack([sequence.visible(length) for sequence in rows])


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
