"""The processes of `accelerate launch`: which one this is, what it takes of the work, and what all of them found.

Every process runs the same program and comes to the same exchanges in the same order. What fails in one of them
between two exchanges is told at the next, and ends all; what fails alike in all is said by the first alone. In a
program that was started by itself nothing of this does anything.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState

from icl_markup.errors import MarkupError
from icl_markup.sharded import check_launcher, offloads_layers

T = TypeVar("T")
R = TypeVar("R")

_WAIT = timedelta(days=7)
"""How long processes wait for one another: for as long as the first trains what the others then load."""

_BEFORE_SPEAKING = 5.0
"""Seconds that other processes give the first to say what is wrong; the launcher ends them when it has ended."""

_groups: dict[Any, Any] = {}
"""The group that objects are exchanged in, by the default group that it was made beside."""


@dataclass(frozen=True)
class Processes:
    """The processes that run this program together, seen from one of them.

    Attributes:
        index: which of them this is, from 0 on.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def joined(cls, *, on_cpu: bool = False) -> Processes:
        """Join the processes that a launcher has started, on a device of its own each; alone where there are none.

        Raises:
            BackboneError: the launcher was told to split models in a way that does not work here.
        """
        check_launcher()
        if launched() > 1 or offloads_layers():
            PartialState(cpu=on_cpu)
        return cls.here()

    @classmethod
    def here(cls) -> Processes:
        """Return the processes that were joined; this one alone where none were."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the first: the one that writes, and shows how far it is."""
        return self.index == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's items: one stretch of them, so that all stretches in order are all items, each once."""
        return items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count]

    def share(self, items: Sequence[T], work: Callable[[Sequence[T]], R]) -> list[R]:
        """Do some work on this process's part of the items.

        Args:
            items: the same in every process.
            work: called once with the part, and not at all where it is empty because there are too few items.

        Returns:
            What every process found in its part, in the order of the items; the same in every process.

        Raises:
            MarkupError: as `together`.
        """
        mine = self.part(items)
        found = self.together(lambda: [work(mine)] if mine or self.count == 1 else [])
        return [one for part in found for one in part]

    def from_main(self, work: Callable[[], R]) -> R:
        """Do some work in the first process, for which the others wait, and return what it found in every process.

        Raises:
            MarkupError: as `together`.
        """
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], R]) -> list[R]:
        """Do some work in every process, and tell all what each has found.

        Args:
            work: what it returns is pickled where there are several processes. It must not wait for other processes.

        Returns:
            What each process found, in order.

        Raises:
            MarkupError: the work has failed in some process, with that error in all of them.
            RuntimeError: the same, with an error of another kind.
        """
        if self.count == 1:
            return [work()]
        mine: R | None = None
        error: Exception | None = None
        try:
            mine = work()
        except Exception as caught:
            error = caught
        outcomes: list[Any] = [None] * self.count
        dist.all_gather_object(outcomes, (mine, error and _told(error)), group=_group())
        if error is not None:
            raise error
        for index, (_, failure) in enumerate(outcomes):
            if failure is not None:
                kind, text = failure
                raise kind(text) if kind else RuntimeError(f"process {index} of {self.count} failed:\n{text}")
        return [found for found, _ in outcomes]


def launched() -> int:
    """Return how many processes a launcher says that it has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Return whether this process is the first of those started, joined or not."""
    return int(os.environ.get("RANK") or 0) == 0


def let_the_first_speak() -> None:
    """Wait for the first process to say what is wrong, which ends all of them, lest each says it.

    Where only this one fails, it comes back and can say it.
    """
    if not is_first():
        time.sleep(_BEFORE_SPEAKING)


def leave() -> None:
    """End what processes that have joined one another have in common, once all have done their work."""
    if dist.is_available() and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


def _told(error: Exception) -> tuple[type[MarkupError] | None, str]:
    """Return the kind of an error, where it is one of ours, and what is to be said of it."""
    if isinstance(error, MarkupError):
        return type(error), str(error)
    return None, "".join(traceback.format_exception(error))


def _group() -> Any:
    """Return a group for objects, on the CPU whatever the device is, which waits as long as one process trains."""
    default = dist.group.WORLD
    if default not in _groups:
        _groups.clear()
        _groups[default] = dist.new_group(backend="gloo", timeout=_WAIT)
    return _groups[default]
