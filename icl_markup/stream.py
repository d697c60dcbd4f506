"""The stream of training batches: episodes composed, sorted by length in windows, cut under a token budget.

A window is a fixed number of episodes. Its prompts are sorted by length and cut into batches, so that little is
padded; the batches then come in random order. The stream is a function of its configuration and seed alone, so
that a run continues where it stopped by starting at a position.
"""

from __future__ import annotations

import itertools
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from icl_markup.batching import cut_by_length
from icl_markup.episodes import Episode, EpisodeSampler
from icl_markup.errors import MarkupError, PromptError
from icl_markup.markup import Markup
from icl_markup.prompt import Prompt


class Item(NamedTuple):
    """Prompts that are computed together, and the episode they were composed from.

    Attributes:
        prompts: one prompt, or all of an episode's if whole names answer: their context is then read once.
        episode: the episode.
        tokens: what they count for in a batch, padding aside.
    """

    prompts: tuple[Prompt, ...]
    episode: Episode
    tokens: int

    @property
    def prompt(self) -> Prompt:
        """The prompt of an item that has one."""
        [only] = self.prompts
        return only

    def slots(self, *, all_slots: bool) -> int:
        """Return how many slots are trained on: all of the prompts' slots, or their queries' alone."""
        return sum(all_slots or slot.is_query for prompt in self.prompts for slot in prompt.slots)


def prompts_of(items: Sequence[Item]) -> tuple[list[Prompt], list[Episode]]:
    """Return the prompts of a batch, and the episode of each."""
    pairs = [(prompt, item.episode) for item in items for prompt in item.prompts]
    return [prompt for prompt, _ in pairs], [episode for _, episode in pairs]


class Position(NamedTuple):
    """Where a stream stands: the window, and the number of its batches that were consumed."""

    window: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Step:
    """The batches of one optimiser step, and where the stream stands after it."""

    batches: tuple[tuple[Item, ...], ...]
    after: Position
    skipped: int
    """Episodes of the step's windows that did not fit the backbone even without demonstrations."""


Window: TypeAlias = tuple[list[tuple[Item, ...]], int]
"""The batches of a window, and how many of its episodes did not fit."""


class PromptStream:
    """Training batches.

    Args:
        markup: composes the prompts.
        sampler: draws the episodes.
        window: episodes a window.
        batch_tokens: the most tokens a batch may hold, padding included.
        batches_per_step: batches an optimiser step takes (gradient accumulation times processes).
        workers: processes that draw and compose windows ahead of the steps; 0: it is done between steps. The batches
            are the same.
        tokens: what prompts of one episode count for if they are computed together; by default their own lengths.
    """

    def __init__(
        self,
        markup: Markup,
        sampler: EpisodeSampler,
        *,
        window: int,
        batch_tokens: int,
        batches_per_step: int,
        workers: int = 0,
        tokens: Callable[[Sequence[Prompt], Episode], int] | None = None,
    ):
        self.markup = markup
        self.sampler = sampler
        self.window = window
        self.batch_tokens = batch_tokens
        self.batches_per_step = batches_per_step
        self.workers = workers
        self.tokens = tokens or (lambda prompts, _episode: sum(len(prompt.ids) for prompt in prompts))

    def steps(self, start: Position = Position()) -> Iterator[Step]:  # noqa: B008 (immutable)
        """Yield steps from a position on, without end.

        Raises:
            PromptError: not one prompt of a whole window fits the backbone.
        """
        pending: list[tuple[Item, ...]] = []
        offset = start.batch
        skipped = 0
        for window, (batches, unfit) in enumerate(self._windows(start.window), start.window):
            skipped += unfit if offset == 0 else 0
            for index in range(offset, len(batches)):
                pending.append(batches[index])
                if len(pending) == self.batches_per_step:
                    yield Step(tuple(pending), Position(window, index + 1), skipped)
                    pending, skipped = [], 0
            offset = 0

    def _windows(self, start: int) -> Iterator[Window]:
        """Yield windows in order from one on, made by workers where there are some."""
        if not self.workers:
            yield from map(self.window_at, itertools.count(start))
            return
        # A worker inherits the stream by forking: nothing of it need be copied, and it touches no tensor.
        loader = DataLoader(
            _Windows(self),
            batch_size=None,
            sampler=range(start, sys.maxsize),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the loader draws a seed, which must not come from the run's own numbers
        )
        for found in loader:
            if isinstance(found, MarkupError):
                raise found
            yield found

    def window_at(self, window: int) -> Window:
        """Return the batches of a window, and how many of its episodes did not fit.

        Raises:
            PromptError: not one prompt of the window fits the backbone.
        """
        items: list[Item] = []
        skipped, reason = 0, None
        for position in range(self.window):
            episode = self.sampler.episode(window, position)
            try:
                prompts = tuple(self.markup.compose_each(episode))
                groups = [prompts] if self.markup.answers == "names" else [(prompt,) for prompt in prompts]
                items += [Item(group, episode, self.tokens(group, episode)) for group in groups]
            except PromptError as error:
                skipped, reason = skipped + 1, error
        if not items:
            raise PromptError(f"no prompt of a whole window of {self.window} episodes could be composed: {reason}")
        cut = cut_by_length([item.tokens for item in items], self.batch_tokens)
        random.Random(f"{self.sampler.seed}/order/{window}").shuffle(cut)
        return [tuple(items[i] for i in part) for part in cut], skipped


class _Windows(Dataset[Window | MarkupError]):
    """Windows by number; an error is returned, as what a worker raises loses its message on the way."""

    def __init__(self, stream: PromptStream):
        self.stream = stream

    def __getitem__(self, window: int) -> Window | MarkupError:
        try:
            return self.stream.window_at(window)
        except MarkupError as error:
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
