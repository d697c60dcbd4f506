"""What of a long list of labels and demonstrations a prompt shows for a query: the nearest, by similarities given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_markup.episodes import Demo, Episode, Query


def label_similarity(similarity: NDArray[Any], owners: NDArray[np.intp], labels: int) -> NDArray[Any]:
    """Return how near each label is to each query: the mean of its two nearest texts, its name among them.

    Args:
        similarity: of queries and texts, (queries, texts).
        owners: the label of each text, (texts,); every label has at least one.
        labels: how many labels there are.

    Returns:
        Shape (queries, labels).
    """
    order = np.argsort(owners, kind="stable")
    starts = np.searchsorted(owners[order], np.arange(labels))
    ends = np.append(starts[1:], len(owners))
    near = np.empty((len(similarity), labels), dtype=similarity.dtype)
    for label, (start, end) in enumerate(zip(starts, ends, strict=True)):
        near[:, label] = np.sort(similarity[:, order[start:end]], axis=1)[:, -2:].mean(axis=1)
    return near


def nearest_demos(similarity: NDArray[Any], answers: NDArray[np.intp], options: Sequence[int], most: int) -> list[int]:
    """Choose demonstrations for a query: the nearest of each option, then the nearest of all.

    Args:
        similarity: of the query and every demonstration, (demonstrations,).
        answers: the label of each demonstration, (demonstrations,).
        options: the labels that are shown.
        most: at most so many.

    Returns:
        Indices of demonstrations, most similar last, where a causal model attends to them best (Liu et al. 2022).
    """
    allowed = np.flatnonzero(np.isin(answers, list(options)))
    order = [int(j) for j in allowed[np.argsort(-similarity[allowed], kind="stable")]]
    firsts: dict[int, int] = {}
    for j in order:
        firsts.setdefault(int(answers[j]), j)
    kept = list(firsts.values())[:most]
    chosen = set(kept)
    kept += [j for j in order if j not in chosen][: most - len(kept)]
    return sorted(kept, key=lambda j: float(similarity[j]))


def single(episode: Episode, query: Query, options: Sequence[int], demos: Sequence[Demo]) -> Episode:
    """Return an episode of one query over some of an episode's options.

    Args:
        episode: where options come from.
        query: the query; its answer becomes None where its option is left out.
        options: indices of the options, in the order in which they are shown.
        demos: demonstrations, whose answers are indices of `episode`'s options, all of them among `options`.
    """
    place = {old: new for new, old in enumerate(options)}
    answer = None if query.answer is None else place.get(query.answer)
    return Episode(
        tuple(episode.options[i] for i in options),
        tuple(Demo(demo.text, place[demo.answer]) for demo in demos),
        (Query(query.text, answer),),
        episode.task,
        episode.task_description,
    )
