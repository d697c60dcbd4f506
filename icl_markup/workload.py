"""What a warm-up will read: its own batches, drawn and composed before it runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from icl_markup.episodes import EpisodeSampler
from icl_markup.markup import Markup
from icl_markup.model import MarkupModel
from icl_markup.stream import Item, PromptStream
from icl_markup.tasks import Task
from icl_markup.warmup_config import WarmupConfig

_LEAST_BATCHES = 32
_MOST_WINDOWS = 16


class Size(NamedTuple):
    """The size of a batch: rows of tokens (of each prompt as many as copies of it are read), and the longest."""

    rows: int
    longest: int

    @property
    def positions(self) -> int:
        """Tokens with padding."""
        return self.rows * self.longest


@dataclass(frozen=True)
class Workload:
    """Batches of a warm-up.

    Attributes:
        batches: batches as the stream gives them, in its order.
        sizes: the size of each.
        tokens: tokens of all of them, padding left out; a prompt of several copies counts as often.
        episodes: the episodes that they were made of.
        compose_seconds: the time in which this machine drew and composed an episode.
        validation: a prompt's size for each episode of one validation.
    """

    batches: tuple[tuple[Item, ...], ...]
    sizes: tuple[Size, ...]
    tokens: int
    episodes: int
    compose_seconds: float
    validation: tuple[Size, ...]

    @classmethod
    def draw(
        cls,
        config: WarmupConfig,
        model: MarkupModel,
        sampler: EpisodeSampler,
        validation_tasks: Sequence[Task],
        least: int,
    ) -> Workload:
        """Draw whole windows, until there are `least` batches or enough of them to speak of a mean.

        Raises:
            PromptError: not one prompt of a window fits the backbone.
        """
        plan = config.optimiser
        markup = model.markup
        stream = PromptStream(
            markup,
            sampler,
            window=plan.window,
            batch_tokens=plan.batch_tokens,
            batches_per_step=1,
            tokens=model.tokens_of,
        )
        batches: list[tuple[Item, ...]] = []
        began, windows = time.perf_counter(), 0
        while len(batches) < max(least, _LEAST_BATCHES) and windows < _MOST_WINDOWS:
            batches += stream.window_at(windows)[0]
            windows += 1
        seconds = (time.perf_counter() - began) / (windows * plan.window)
        return cls(
            tuple(batches),
            tuple(_size(markup, batch) for batch in batches),
            sum(item.tokens for batch in batches for item in batch),
            windows * plan.window,
            seconds,
            tuple(_validation(config, model, validation_tasks)),
        )

    @property
    def positions(self) -> int:
        """Tokens of all batches, with padding."""
        return sum(size.positions for size in self.sizes)

    def samples(self) -> list[int]:
        """Return batches to look at closely: those of the shortest, middle and longest prompts, and the largest.

        What a batch costs is a polynomial of its size: a few batches tell what all of them cost.
        """
        by_length = sorted(range(len(self.sizes)), key=lambda i: (self.sizes[i].longest, self.sizes[i].positions))
        largest = max(range(len(self.sizes)), key=lambda i: self.sizes[i].positions * (4096 + self.sizes[i].longest))
        return sorted({by_length[0], by_length[len(by_length) // 2], by_length[-1], largest})

    def steps(self, batches: int) -> Iterator[list[int]]:
        """Yield the batches of each step of so many; where all of them are too few, they are taken again."""
        order = itertools.cycle(range(len(self.sizes)))
        for _ in range(max(1, len(self.sizes) // batches)):
            yield list(itertools.islice(order, batches))


@dataclass(frozen=True)
class Curve:
    """A cost as a function of a batch's size: for the batch, for each position, for each pair of tokens in a row."""

    fixed: float
    per_position: float
    per_pair: float

    @classmethod
    def through(cls, sizes: Sequence[Size], costs: Sequence[float]) -> Curve:
        """Fit one to measured costs, none of its parts negative; relative errors count."""
        matrix = np.array([[1.0, size.positions, size.positions * size.longest] for size in sizes])
        wanted = np.array(costs, dtype=float)
        scale = np.where(wanted > 0, wanted, 1.0)
        units = matrix.max(0)
        found, _ = nnls(matrix / units / scale[:, None], wanted / scale)
        fixed, per_position, per_pair = (float(x) for x in found / units)
        return cls(fixed, per_position, per_pair)

    def at(self, size: Size) -> float:
        """Return the cost of a batch."""
        return self.fixed + size.positions * (self.per_position + self.per_pair * size.longest)

    def of_prompts(self, sizes: Sequence[Size], batch_tokens: int) -> float:
        """Return the cost of prompts that are read in full batches, without padding."""
        batches = sum(size.positions for size in sizes) / batch_tokens
        return self.fixed * batches + sum(self.at(size) - self.fixed for size in sizes)


def _size(markup: Markup, batch: Sequence[Item]) -> Size:
    """Return how many rows a batch has, and how long they are: of names behind one context, one row for all."""
    if markup.layout.kind == "causal":
        return Size(len(batch), max(item.tokens for item in batch))
    longest = max(len(prompt.ids) for item in batch for prompt in item.prompts)
    return Size(sum(-(-item.tokens // longest) for item in batch), longest)


def _validation(config: WarmupConfig, model: MarkupModel, tasks: Sequence[Task]) -> Iterator[Size]:
    plan = config.validation
    for task in tasks:
        sampler = EpisodeSampler([task], plan.episode_config, seed=config.seed)
        for episode in (sampler.episode(0, i) for i in range(plan.episodes)):
            for prompt in model.markup.compose_each(episode):
                yield Size(1, model.tokens_of([prompt], episode))
