"""Evaluation: methods answer the same episodes, and every accuracy comes with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler
from icl_markup.errors import PromptError
from icl_markup.model import MarkupModel
from icl_markup.priors import Prior, log_probs_of
from icl_markup.processes import Processes
from icl_markup.tasks import Task


@dataclass(frozen=True)
class Answers:
    """Answers to queries.

    Attributes:
        correct: whether each query was answered rightly, shape (queries,), bool.
        loss: the negative log-probability of each right answer, shape (queries,).
        shortened: how many demonstrations were shortened to fit, over all prompts.
        dropped: how many were left out.
    """

    correct: NDArray[np.bool_]
    loss: NDArray[np.float64]
    shortened: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def draw_episodes(
    task: Task,
    *,
    n_way: int | None,
    k_shot: int,
    episodes: int,
    seed: int,
    query_split: str = "test",
    queries: int = 1,
) -> list[Episode]:
    """Draw episodes: demonstrations from ``train``, queries from `query_split`.

    Args:
        task: the task.
        n_way: options an episode, or None for every label.
        k_shot: demonstrations a label.
        episodes: how many.
        seed: seeds them; the same seed gives the same episodes to every method.
        query_split: the split of the queries; where the task has no such split, ``train``.
        queries: queries an episode; those of one episode share the work for its context.

    Raises:
        TaskError: the task cannot give such episodes.
    """
    config = EpisodeConfig(
        n_way=None if n_way is None else (n_way, n_way),
        k_shot=(k_shot, k_shot),
        queries=(queries, queries),
        query_split=query_split if query_split in task.splits else "train",
    )
    sampler = EpisodeSampler([task], config, seed)
    return [sampler.episode(0, position) for position in range(episodes)]


def answer_queries(
    model: MarkupModel, episodes: Sequence[Episode], batch_tokens: int = 2048, prior: Prior = "none"
) -> Answers:
    """Answer every query of every episode.

    Args:
        model: the model.
        episodes: the episodes.
        batch_tokens: the most tokens of one forward pass.
        prior: what is divided out of the answers (`icl_markup.priors`).

    Raises:
        PromptError: a query's right answer is not known, or a prompt cannot be composed.
    """
    correct, loss, shortened, dropped = [], [], 0, 0
    for episode, found in zip(episodes, log_probs_of(model, episodes, prior, batch_tokens), strict=True):
        for query, log_probs in zip(episode.queries, found.log_probs, strict=True):
            if query.answer is None:
                raise PromptError(f"the query {query.text[:60]!r} has no right answer to compare with")
            correct.append(int(np.argmax(log_probs)) == query.answer)
            loss.append(-float(log_probs[query.answer]))
        shortened, dropped = shortened + sum(found.shortened), dropped + sum(found.dropped)
    return Answers(np.array(correct, dtype=bool), np.array(loss), shortened, dropped)


def answer_together(
    model: MarkupModel, episodes: Sequence[Episode], batch_tokens: int = 2048, prior: Prior = "none"
) -> Answers:
    """Answer as `answer_queries` does, each process of `accelerate launch` its part of the episodes.

    Every process gets all answers, the same to the bit; those of another number of processes differ by rounding, as
    their batches do. A backbone that is split over processes answers everything in each.

    Raises:
        PromptError: as `answer_queries`, in every process.
    """
    if model.backbone.is_sharded:
        return answer_queries(model, episodes, batch_tokens, prior)
    found = Processes.here().share(episodes, lambda part: answer_queries(model, part, batch_tokens, prior))
    return Answers(
        np.concatenate([one.correct for one in found]),
        np.concatenate([one.loss for one in found]),
        sum(one.shortened for one in found),
        sum(one.dropped for one in found),
    )


def estimate(correct: NDArray[np.bool_], seed: int = 0) -> Estimate:
    """Estimate an accuracy.

    Args:
        correct: shape (episodes,), or (variants, episodes) where several wordings or warm-up seeds answered the
            same episodes; the mean is over all, and the interval over episodes.
        seed: seeds the bootstrap.

    Returns:
        The mean with its 95 % interval: Wilson's score interval for one variant (exact coverage near 0 and 1
        matters more than width there), a percentile bootstrap over episodes for several (`scipy.stats`).
    """
    correct = np.atleast_2d(correct)
    mean = float(correct.mean())
    if len(correct) == 1:
        interval = stats.binomtest(int(correct.sum()), correct.size).proportion_ci(method="wilson")
        return Estimate(mean, float(interval.low), float(interval.high))
    by_episode = correct.mean(axis=0)
    if np.ptp(by_episode) == 0:  # the bootstrap of a constant is that constant
        return Estimate(mean, mean, mean)
    result = stats.bootstrap(
        (by_episode,), np.mean, method="percentile", n_resamples=2000, vectorized=True, rng=np.random.default_rng(seed)
    )
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def chance(episodes: Sequence[Episode]) -> Estimate:
    """Return the expected accuracy of a uniform guess over the options; it has no spread."""
    mean = float(np.mean([1 / len(episode.options) for episode in episodes]))
    return Estimate(mean, mean, mean)
