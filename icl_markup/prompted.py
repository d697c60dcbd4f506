"""Methods that compose prompts: plain words, tags, and models trained on episodes, with calibration where asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from icl_markup.episodes import Episode, Query
from icl_markup.method import EpisodeScores
from icl_markup.model import MarkupModel
from icl_markup.tasks import NONE_OF_THE_ABOVE

Calibration = Literal["none", "contextual", "domain", "batch"]

CONTENT_FREE = ("N/A", "[MASK]", "...")
"""Texts without content (Zhao et al. 2021, whose third is the empty text; a prompt here needs one)."""

DOMAIN_TEXTS = 10
"""Texts of random words of the domain, of which domain-context calibration takes the mean (Fei et al. 2023: 20)."""


@dataclass(frozen=True)
class Prompted:
    """Prompts of one template.

    Attributes:
        model: the backbone with its template.
        calibration: what is divided out of the probabilities: contextual, the mean probabilities of content-free texts
            (Zhao et al. 2021); domain, those of texts of random words that stand in the demonstrations (Fei et al.
            2023; the label names' words where there is no demonstration); batch, the mean over the episode's queries
            (Zhou et al. 2024).
        offers_none: offer "none of the above" in an open world; if not, the largest probability of the other options
            decides what is out of scope.
        shows_demos: compose the demonstrations into the prompt; if not, label names alone say what options mean.
        batch_tokens: the most tokens of one forward pass.
    """

    model: MarkupModel
    calibration: Calibration = "none"
    offers_none: bool = True
    shows_demos: bool = True
    batch_tokens: int = 4096

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode.

        Raises:
            PromptError: a prompt cannot be composed.
        """
        asked = [self._prepared(episode) for episode in episodes]
        probes = [self._probes(episode) for episode in asked]
        both = [replace(e, queries=e.queries + probe) for e, probe in zip(asked, probes, strict=True)]
        results = []
        for episode, shown, found in zip(episodes, asked, self.model.scores(both, self.batch_tokens), strict=True):
            raw = np.array([one.scores.double().numpy() for one in found])
            log_probs = log_softmax(raw, axis=1)
            own, probed = log_probs[: len(shown.queries)], log_probs[len(shown.queries) :]
            own = self._calibrated(own, probed)
            missing = len(episode.options) - own.shape[1]
            own = np.pad(own, ((0, 0), (0, missing)), constant_values=-np.inf)
            results.append(
                EpisodeScores(
                    own,
                    out_of_scope(own, episode),
                    max(one.shortened for one in found),
                    max(one.dropped for one in found),
                )
            )
        return results

    def _prepared(self, episode: Episode) -> Episode:
        if not self.offers_none and is_open(episode):
            # The answers of out-of-scope queries point at the option that is gone; nothing here reads answers.
            queries = tuple(query._replace(answer=None) for query in episode.queries)
            episode = replace(episode, options=episode.options[:-1], queries=queries)
        return episode if self.shows_demos else replace(episode, demos=())

    def _probes(self, episode: Episode) -> tuple[Query, ...]:
        if self.calibration == "contextual":
            return tuple(Query(text) for text in CONTENT_FREE)
        if self.calibration == "domain":
            texts = [demo.text for demo in episode.demos] or [option.name for option in episode.options]
            words = [word for text in texts for word in text.split()]
            length = max(1, round(len(words) / len(texts)))
            rng = random.Random(" ".join(texts))
            return tuple(Query(" ".join(rng.choices(words, k=length))) for _ in range(DOMAIN_TEXTS))
        return ()

    def _calibrated(self, own: NDArray[np.float64], probed: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.calibration == "none":
            return own
        sample = own if self.calibration == "batch" else probed
        prior = logsumexp(sample, axis=0) - np.log(len(sample))
        return np.asarray(log_softmax(own - prior, axis=1))


def is_open(episode: Episode) -> bool:
    """Whether an episode offers "none of the above"."""
    return episode.options[-1].name == NONE_OF_THE_ABOVE


def out_of_scope(log_probs: NDArray[np.float64], episode: Episode) -> NDArray[np.float64]:
    """Return how little any option fits.

    Args:
        log_probs: shape (queries, options).
        episode: its last option says whether it is an open world; that option may have been ruled out (-inf).

    Returns:
        The log-odds of "none of the above" where it has a probability, else minus the largest log-probability; shape
        (queries,).
    """
    if is_open(episode) and np.isfinite(log_probs[:, -1]).all():
        return np.asarray(log_probs[:, -1] - logsumexp(log_probs[:, :-1], axis=1))
    return np.asarray(-log_probs.max(axis=1))
