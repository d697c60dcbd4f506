"""Episodes: one in-context problem each, drawn from tasks as a pure function of (seed, step, position).

An episode draws N options and K demonstrations a label from one task, and one or more queries. In an open-world
episode the last option is "none of the above", and a query may be one that no option covers. Because an
episode depends on nothing but (seed, step, position), it is the same whatever the number of workers or
processes, and whether or not a run was interrupted.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from icl_markup.errors import TaskError, nearest
from icl_markup.tasks import NONE_OF_THE_ABOVE, Task, Texts

_MOST_ROWS = 512
"""The most labels whose neighbours are kept in memory; in a task of 10,000 labels they take 20 MB."""


class Option(NamedTuple):
    """A label offered as an answer; `description` falls back to the name."""

    name: str
    description: str = ""


class Demo(NamedTuple):
    """A demonstration: a text and the index of its option."""

    text: str
    answer: int


class Query(NamedTuple):
    """A text to classify and the index of the right option, or None where nobody knows."""

    text: str
    answer: int | None = None


@dataclass(frozen=True)
class Episode:
    """Options, demonstrations and queries of one in-context problem; `task_description` may be empty.

    If `shows_options` is false, the prompt leaves the options out, and they are scored all the same.
    """

    options: tuple[Option, ...]
    demos: tuple[Demo, ...]
    queries: tuple[Query, ...]
    task: str = ""
    task_description: str = ""
    shows_options: bool = True


@dataclass(frozen=True)
class EpisodeConfig:
    """How episodes are drawn."""

    n_way: tuple[int, int] | None = (2, 8)
    """Fewest and most options, "none of the above" not counted; null: every label of the task."""

    k_shot: tuple[int, int] = (0, 2)
    """Fewest and most demonstrations a label."""

    max_demos: int | None = None
    """At most this many demonstrations an episode: K is lowered where N x K would be more."""

    queries: tuple[int, int] = (1, 1)
    """Fewest and most queries an episode."""

    none_option: float = 0.0
    """Probability that an episode offers "none of the above" as its last option."""

    out_of_scope: float = 0.0
    """Probability, in an episode with that option, that a query is one which no other option covers."""

    hard_options: float = 0.0
    """Probability that the options are one label and the labels whose names are nearest to it."""

    task_weights: dict[str, float] = field(default_factory=dict)
    """Relative probability of each task, by name; 1 where it is not given."""

    demo_split: str = "train"
    """The split that demonstrations come from."""

    query_split: str = "train"
    """The split that queries come from; where it equals demo_split, no query is among the demonstrations."""


class EpisodeSampler:
    """Draws episodes from tasks.

    Args:
        tasks: the tasks to draw from.
        config: how to draw.
        seed: any integer; part of what an episode depends on.

    Raises:
        TaskError: a task cannot give the episodes asked for, a split is missing, or a weight is wrong.
    """

    def __init__(self, tasks: Sequence[Task], config: EpisodeConfig, seed: int = 0):
        if not tasks:
            raise TaskError("no task to draw episodes from")
        self.config = config
        self.seed = seed
        names = [task.name for task in tasks]
        for name, weight in config.task_weights.items():
            if name not in names:
                raise TaskError(f"task_weights names {name!r}, which is no task here{nearest(name, names)}")
            if weight < 0:
                raise TaskError(f"task_weights: the weight of {name!r} is {weight}; it must not be negative")
        self._weights = [config.task_weights.get(name, 1.0) for name in names]
        if sum(self._weights) <= 0:
            raise TaskError("task_weights: every task has weight 0")
        _check_ranges(config)
        self._pools = [_Pool(task, config) for task in tasks]

    def episode(self, step: int, position: int) -> Episode:
        """Return the episode at (seed, step, position)."""
        # A string seed is hashed with SHA-512: neighbouring steps and positions share nothing.
        rng = random.Random(f"{self.seed}/{step}/{position}")
        pool = rng.choices(self._pools, self._weights)[0]
        return pool.draw(rng)


def _check_ranges(config: EpisodeConfig) -> None:
    ranges = {"n_way": (config.n_way, 2), "k_shot": (config.k_shot, 0), "queries": (config.queries, 1)}
    for name, (bounds, least) in ranges.items():
        if bounds is not None and not least <= bounds[0] <= bounds[1]:
            raise TaskError(f"{name}: {list(bounds)} is no range of at least {least} from low to high")
    if config.max_demos is not None and config.max_demos < 0:
        raise TaskError(f"max_demos: {config.max_demos} is negative")
    for name in ("none_option", "out_of_scope", "hard_options"):
        if not 0 <= getattr(config, name) <= 1:
            raise TaskError(f"{name}: {getattr(config, name)} is no probability between 0 and 1")


class Remaining:
    """The whole numbers below `count` without some of them, in order; only those that are gone are held in memory.

    Args:
        count: how many there were.
        gone: those that are left out.
    """

    def __init__(self, count: int, gone: Iterable[int]):
        self._count = count
        # The i-th that is gone has so many before it that remain; numbers of more than these lie behind it.
        self._before = [place - i for i, place in enumerate(sorted(set(gone)))]

    def __len__(self) -> int:
        return self._count - len(self._before)

    def __getitem__(self, index: int) -> int:
        return index + bisect_right(self._before, index)


class _Neighbours:
    """For each label the other ones, nearest name first (cosine of character n-grams of name and description)."""

    def __init__(self, task: Task):
        words = [f"{label} {task.descriptions.get(label, '')}" for label in task.labels]
        self._labels = task.labels
        self._matrix = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform(words)
        self._transposed = self._matrix.T.tocsr()
        self._kept: dict[int, NDArray[np.intp]] = {}

    def of(self, label: int) -> Iterator[str]:
        """Yield the neighbours of the label at a place of the task's labels."""
        # A row at a time: all of them together grow with the square of the number of labels.
        if label not in self._kept:
            if len(self._kept) == _MOST_ROWS:
                del self._kept[next(iter(self._kept))]
            similarity = (self._matrix[label] @ self._transposed).toarray()[0]
            self._kept[label] = (-similarity).argsort(kind="stable").astype(np.int32)
        return (self._labels[j] for j in self._kept[label] if j != label)


class _Pool:
    """One task's texts, arranged for drawing."""

    def __init__(self, task: Task, config: EpisodeConfig):
        self.task = task
        self.config = config
        self.shared = config.demo_split == config.query_split
        self.demos = task.distinct(config.demo_split)
        self.queries = self.demos if self.shared else task.distinct(config.query_split)
        self.place = {label: i for i, label in enumerate(task.labels)}
        self.asked = [i for i, label in enumerate(task.labels) if self.queries.get(label)]
        self.oos = task.out_of_scope(config.query_split)
        self._eligible: dict[int, dict[str, None]] = {}
        if len(self.eligible(config.k_shot[0])) < 2:
            raise TaskError(
                f"task {task.name!r} has fewer than two labels with {config.k_shot[0]} demonstrations in split "
                f"{config.demo_split!r} and a query in {config.query_split!r}; lower k_shot or add examples"
            )

    def eligible(self, shots: int) -> dict[str, None]:
        """Return the labels that have `shots` demonstrations and a query besides, as keys in their order."""
        if shots not in self._eligible:
            self._eligible[shots] = dict.fromkeys(
                label
                for label in self.task.labels
                if len(self.demos.get(label, ())) >= shots + self.shared and self.queries.get(label)
            )
        return self._eligible[shots]

    @cached_property
    def neighbours(self) -> _Neighbours:
        return _Neighbours(self.task)

    def draw(self, rng: random.Random) -> Episode:
        config = self.config
        wanted = rng.randint(*config.n_way) if config.n_way else len(self.task.labels)
        shots = rng.randint(*config.k_shot)
        if config.max_demos is not None:
            shots = min(shots, config.max_demos // wanted)
        while len(self.eligible(shots)) < 2:
            shots -= 1
        labels = self._draw_labels(rng, wanted, shots)
        open_world = rng.random() < config.none_option
        index = {label: i for i, label in enumerate(labels)}
        demos = [
            Demo(self.demos[label][place], index[label])
            for label in labels
            if shots
            for place in rng.sample(range(len(self.demos[label])), shots)
        ]
        rng.shuffle(demos)
        shown = {demo.text for demo in demos}
        queries: list[Query] = []
        for _ in range(rng.randint(*config.queries)):
            queries.append(self._draw_query(rng, labels, open_world, shown, {query.text for query in queries}))
        options = [Option(label, self.task.descriptions.get(label, "")) for label in labels]
        if open_world:
            options.append(Option(NONE_OF_THE_ABOVE))
        return Episode(tuple(options), tuple(demos), tuple(queries), self.task.name, self.task.description)

    def _draw_labels(self, rng: random.Random, wanted: int, shots: int) -> list[str]:
        eligible = self.eligible(shots)
        count = min(wanted, len(eligible))
        if rng.random() < self.config.hard_options and count < len(eligible):
            centre = rng.choice(tuple(eligible))
            near = (label for label in self.neighbours.of(self.place[centre]) if label in eligible)
            labels = [centre, *islice(near, count - 1)]
            rng.shuffle(labels)
            return labels
        return rng.sample(tuple(eligible), count)

    def _draw_query(
        self, rng: random.Random, labels: list[str], open_world: bool, shown: set[str], asked: set[str]
    ) -> Query:
        if open_world and rng.random() < self.config.out_of_scope:
            offered = {self.place[label] for label in labels}
            others = Remaining(len(self.asked), (bisect_left(self.asked, place) for place in offered))
            # Out-of-scope texts and texts of labels that are not offered are equally good "none of the above".
            if self.oos and (not others or rng.random() < 0.5):
                return Query(rng.choice(self.oos), len(labels))
            if others:
                label = self.task.labels[self.asked[rng.choice(others)]]
                return Query(rng.choice(self.queries[label]), len(labels))
        answer = rng.randrange(len(labels))
        texts = self.queries[labels[answer]]
        # A demonstration is never asked; a query is asked twice only where there is no other.
        unseen = Remaining(len(texts), places(texts, shown))
        fresh = Remaining(len(texts), places(texts, shown | asked)) if asked else unseen
        remaining = next((left for left in (fresh, unseen) if len(left)), range(len(texts)))
        return Query(texts[rng.choice(remaining)], answer)


def places(texts: Texts, among: set[str]) -> Iterator[int]:
    """Yield where in a label's texts some texts stand; of others there is nothing to say."""
    return (place for place in map(texts.find, among) if place is not None)
