"""Draws the episodes that methods are compared on: N-way, the full label set, open world, variations of an episode."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from icl_markup.episodes import Demo, Episode, EpisodeConfig, EpisodeSampler, Option, Query, Remaining, places
from icl_markup.errors import TaskError
from icl_markup.experiment_config import Setting
from icl_markup.tasks import NONE_OF_THE_ABOVE, Task


def draw(task: Task, setting: Setting, *, episodes: int, queries: int, seed: int, query_split: str) -> list[Episode]:
    """Draw the episodes of a cell: demonstrations from ``train``, queries from `query_split`.

    Args:
        task: the task.
        setting: N-way or the full label set, K, open or closed world.
        episodes: how many.
        queries: queries an episode.
        seed: seeds them; the same seed gives the same episodes to every method.
        query_split: the split of the queries; where the task has no such split, ``train``.

    Raises:
        TaskError: the task cannot give such episodes.
    """
    split = query_split if query_split in task.splits else "train"
    if setting.n_way is None:
        return [_full(task, setting, queries, random.Random(f"{seed}/full/{i}"), split) for i in range(episodes)]
    config = EpisodeConfig(
        n_way=(setting.n_way, setting.n_way),
        k_shot=(setting.k_shot, setting.k_shot),
        queries=(queries, queries),
        query_split=split,
        none_option=1.0 if setting.open_world else 0.0,
        out_of_scope=0.5 if setting.open_world else 0.0,
    )
    sampler = EpisodeSampler([task], config, seed)
    return [_answerable(sampler.episode(0, position)) for position in range(episodes)]


def _answerable(episode: Episode) -> Episode:
    """Drop repeated queries, of which a small task gives some: each is answered once."""
    return replace(episode, queries=tuple(dict.fromkeys(episode.queries)))


def _full(task: Task, setting: Setting, queries: int, rng: random.Random, split: str) -> Episode:
    """Draw one episode over every label: at most K demonstrations a label, queries as the split mixes them."""
    by_label = task.distinct("train")
    labels = [label for label in task.labels if by_label.get(label)]
    if len(labels) < 2:
        raise TaskError(f"task {task.name!r} has fewer than two labels with a demonstration in split 'train'")
    demos = []
    for answer, label in enumerate(labels):
        texts = by_label[label]
        places = rng.sample(range(len(texts)), min(setting.k_shot, len(texts)))
        demos += [Demo(texts[place], answer) for place in places]
    shown = {demo.text for demo in demos}
    index = {label: i for i, label in enumerate(labels)}
    none = len(labels)
    asked = []
    for example in dict.fromkeys((e.text, e.label) for e in task.split(split)):
        text, label = example
        if text in shown:
            continue
        if label in index:
            asked.append(Query(text, index[label]))
        elif label == task.oos_label and setting.open_world:
            asked.append(Query(text, none))
    if not asked:
        raise TaskError(f"task {task.name!r} has no query in split {split!r} that is no demonstration")
    options = [Option(label, task.descriptions.get(label, "")) for label in labels]
    if setting.open_world:
        options.append(Option(NONE_OF_THE_ABOVE))
    chosen = asked if len(asked) <= queries else rng.sample(asked, queries)
    rng.shuffle(demos)
    return Episode(tuple(options), tuple(demos), tuple(chosen), task.name, task.description)


def vary(episode: Episode, setting: Setting, variation: int, task: Task, seed: int) -> Episode:
    """Return a variation of an episode that asks the same queries of the same labels.

    Args:
        episode: the episode; variation 0 of an order is the episode itself.
        setting: what varies: the order of demonstrations, the order of options and with it their letters, or which
            demonstrations were drawn.
        variation: which variation.
        task: where other demonstrations are drawn from.
        seed: seeds the choice, together with the episode's queries.
    """
    rng = random.Random(f"{seed}/{setting.vary}/{variation}/{episode.queries[0].text}")
    if setting.vary == "demo order":
        return replace(episode, demos=tuple(rng.sample(episode.demos, len(episode.demos))))
    if setting.vary == "option order":
        return reorder(episode, rng.sample(range(len(episode.options)), len(episode.options)))
    if setting.vary == "drawn demos":
        by_label = task.distinct("train")
        asked = {query.text for query in episode.queries}
        demos: list[Demo] = []
        for demo in episode.demos:
            used = asked | {d.text for d in demos}
            texts = by_label[episode.options[demo.answer].name]
            others = Remaining(len(texts), places(texts, used))
            demos.append(Demo(texts[rng.choice(others)], demo.answer) if len(others) else demo)
        return replace(episode, demos=tuple(demos))
    return episode


def reorder(episode: Episode, order: Sequence[int]) -> Episode:
    """Return an episode whose options stand in another order: `order[i]` is the option that comes i-th."""
    place = {old: new for new, old in enumerate(order)}
    return replace(
        episode,
        options=tuple(episode.options[i] for i in order),
        demos=tuple(replace_answer(d, place) for d in episode.demos),
        queries=tuple(q if q.answer is None else q._replace(answer=place[q.answer]) for q in episode.queries),
    )


def replace_answer(demo: Demo, place: dict[int, int]) -> Demo:
    """Return a demonstration whose option has moved."""
    return demo._replace(answer=place[demo.answer])
