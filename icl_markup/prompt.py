"""A composed prompt: token ids in labelled pieces, and the slots where answers are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

HEAD = 0
"""The segment of special tokens, the template's head and its tail."""


class Piece(NamedTuple):
    """Consecutive ids of one origin: special, tag, text (of the template), value (of a user), symbol or slot.

    `segment` says which part of the prompt they belong to: `HEAD`, or 1, 2, … options and demonstrations, or
    -1, -2, … queries.
    """

    kind: str
    ids: tuple[int, ...]
    segment: int = HEAD


@dataclass(frozen=True)
class Slot:
    """A place where the model is asked for an option.

    Attributes:
        position: the index, in the prompt's ids, of the token whose output predicts the answer; in a
            sequence-to-sequence model the index in the decoder's ids.
        candidates: the ids of the options' symbols, or empty where whole names are scored.
        answer: the index of the right option, or None where it is not known.
        spaced: whether a space stands before the answer, which a whole name then takes into its first token.
        is_query: whether the answer is asked for (a query), and not shown (a demonstration).
    """

    position: int
    candidates: tuple[int, ...]
    answer: int | None
    is_query: bool
    spaced: bool = True


@dataclass(frozen=True)
class Prompt:
    """A prompt; `shortened` and `dropped` count demonstrations that did not fit whole, or at all."""

    pieces: tuple[Piece, ...]
    slots: tuple[Slot, ...]
    shortened: int = 0
    dropped: int = 0

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """All ids, tags' ids among them (those lie beyond the vocabulary's rows)."""
        return tuple(chain.from_iterable(piece.ids for piece in self.pieces))
