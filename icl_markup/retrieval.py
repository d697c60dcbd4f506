"""Retrieval: for a task of many labels, each query's prompt shows the options and demonstrations nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from icl_markup.baselines import EmbeddingLogReg
from icl_markup.episodes import Episode
from icl_markup.errors import PromptError
from icl_markup.experiment_config import RetrievalConfig
from icl_markup.method import EpisodeScores, Method
from icl_markup.prompted import is_open, out_of_scope
from icl_markup.selection import label_similarity, nearest_demos, single
from icl_markup.sentences import SentenceEncoder
from icl_markup.tasks import NONE_OF_THE_ABOVE

TEMPERATURE = 0.05
"""A difference of similarities by this much is one nat of the retriever's opinion."""

UNDECIDED = 0.45
"""In an open world: the similarity of a label at which the retriever holds it and "none of the above" for equally
likely: half-way between what in-scope queries (0.75) and others (0.22) of a validation task have with their nearest
label. A threshold chosen on validation moves with it, so that what is then rejected does not depend on it."""


@dataclass(frozen=True)
class Retrieved:
    """A method that sees, of a task with many labels, what a retriever chooses for each query.

    A label is as near as the mean of its two nearest texts, its name among them, or as probable as logistic regression
    on all demonstrations finds it. The nearest labels become the options, most similar first; their nearest
    demonstrations follow, one a label first, most similar last, where a causal model attends to them best (Liu et al.
    2022). "none of the above", where it is offered, stays.

    With a prior, the prompt's probabilities and the retriever's are multiplied (a product of experts, Hinton 2002).

    Attributes:
        method: scores the prompts.
        encoder: embeds texts.
        config: how many options and demonstrations; the weight of the retriever's opinion.
    """

    method: Method
    encoder: SentenceEncoder
    config: RetrievalConfig

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; options that were not retrieved get -inf."""
        return [self._one(episode) for episode in episodes]

    def _one(self, episode: Episode) -> EpisodeScores:
        labels = len(episode.options) - is_open(episode)
        queries = self.encoder.encode([query.text for query in episode.queries])
        demos = queries @ self.encoder.encode([demo.text for demo in episode.demos]).T if episode.demos else None
        answers = np.array([demo.answer for demo in episode.demos], dtype=np.intp)
        near = nearness(self.encoder, episode, queries)
        opinion = self._opinion(episode, near)
        parts, chosen = [], []
        for i, query in enumerate(episode.queries):
            options = np.argsort(-opinion[i], kind="stable")[: self.config.options].tolist()
            shown = nearest_demos(demos[i], answers, options, self.config.demos) if demos is not None else []
            if is_open(episode):
                options.append(labels)
            parts.append(single(episode, query, options, [episode.demos[j] for j in shown]))
            chosen.append(options)
        found = self.method.scores(parts)
        log_probs = np.full((len(episode.queries), len(episode.options)), -np.inf)
        for i, (options, one) in enumerate(zip(chosen, found, strict=True)):
            log_probs[i, options] = one.log_probs[0]
        scores = np.array([one.out_of_scope[0] for one in found])
        if self.config.prior:
            log_probs[:, :labels] += self.config.prior * opinion
            log_probs = log_softmax(log_probs, axis=1)
            scores = out_of_scope(log_probs, episode)
        shortened, dropped = sum(one.shortened for one in found), sum(one.dropped for one in found)
        return EpisodeScores(log_probs, scores, shortened, dropped)

    def _opinion(self, episode: Episode, near: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the retriever's log-odds of each label against "none of the above", (queries, labels).

        Labels are told apart by the expert; the absolute similarity of the nearest says how likely it is any of them.
        """
        absolute = (near.astype(np.float64) - UNDECIDED) / TEMPERATURE
        if self.config.expert == "similarity":
            return absolute
        (found,) = EmbeddingLogReg(self.encoder).scores([episode])
        return np.asarray(found.log_probs[:, : near.shape[1]] + absolute.max(axis=1, keepdims=True))


def nearness(encoder: SentenceEncoder, episode: Episode, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how near each label is to each query, shape (queries, labels), "none of the above" left out.

    Raises:
        PromptError: the episode has no option besides that.
    """
    labels = len(episode.options) - is_open(episode)
    if not labels:
        raise PromptError(f"the episode has no option besides {NONE_OF_THE_ABOVE!r}; give it labels to choose from")
    names = encoder.encode([option.name for option in episode.options[:labels]])
    texts = encoder.encode([demo.text for demo in episode.demos]) if episode.demos else names[:0]
    vectors = np.concatenate([names, texts])
    owners = np.array([*range(labels), *(demo.answer for demo in episode.demos)])
    return label_similarity(queries @ vectors.T, owners, labels).astype(np.float32)


@dataclass(frozen=True)
class NearestLabel:
    """Retrieval by itself: the label that a retriever puts first; ``out_of_scope`` is the distance to it."""

    encoder: SentenceEncoder

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order.

        Raises:
            PromptError: an episode has no option besides "none of the above".
        """
        results = []
        for episode in episodes:
            near = nearness(self.encoder, episode, self.encoder.encode([q.text for q in episode.queries]))
            log_probs = log_softmax(near.astype(np.float64) / TEMPERATURE, axis=1)
            missing = len(episode.options) - log_probs.shape[1]
            padded = np.pad(log_probs, ((0, 0), (0, missing)), constant_values=-np.inf)
            results.append(EpisodeScores(padded, -near.max(axis=1).astype(np.float64)))
        return results
