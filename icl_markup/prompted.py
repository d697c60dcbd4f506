"""Methods that compose prompts: plain words, tags, and models trained on episodes, with calibration where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from icl_markup.episodes import Episode
from icl_markup.method import EpisodeScores
from icl_markup.model import MarkupModel
from icl_markup.priors import EpisodeLogProbs, Prior, log_probs_by_prior, names_of, without_prior
from icl_markup.tasks import NONE_OF_THE_ABOVE

Calibration = Literal["none", "contextual", "domain", "unconditional", "batch"]


class Probed:
    """A model's answers with each prior that methods want taken off: asked for together, and kept until others are.

    Args:
        model: the model.

    Attributes:
        priors: the priors that are wanted of the next episodes; whoever measures sets them.
    """

    def __init__(self, model: MarkupModel):
        self.model = model
        self.priors: set[Prior] = set()
        self._kept: list[tuple[list[Episode], dict[Prior, list[EpisodeLogProbs]]]] = []
        """Answers to the last two lists of episodes: a test split and a threshold's validation split take turns."""

    def of(self, episodes: Sequence[Episode], prior: Prior, batch_tokens: int) -> list[EpisodeLogProbs]:
        """Answer every query of every episode; see `icl_markup.priors.log_probs_of`."""
        for kept, found in self._kept:
            if prior in found and kept == list(episodes):
                return found[prior]
        found = log_probs_by_prior(self.model, episodes, sorted(self.priors | {prior}), batch_tokens)
        self._kept = [*self._kept[-1:], (list(episodes), found)]
        self.model.prefixes.clear()  # contexts do not come again, and many models together hold much
        return found[prior]


@dataclass(frozen=True)
class Prompted:
    """Prompts of one template.

    Attributes:
        model: the backbone with its template.
        calibration: what is divided out of the probabilities: a prior that the model is asked for
            (`icl_markup.priors`), or with ``batch`` the mean over the episode's queries (Zhou et al. 2024).
        offers_none: offer "none of the above" in an open world; if not, the largest probability of the other options
            decides what is out of scope.
        shows_demos: compose the demonstrations into the prompt; if not, label names alone say what options mean.
        batch_tokens: the most tokens of one forward pass.
    """

    model: Probed
    calibration: Calibration = "none"
    offers_none: bool = True
    shows_demos: bool = True
    batch_tokens: int = 4096

    @property
    def prior(self) -> Prior:
        """The prior that the model is asked for."""
        return "none" if self.calibration == "batch" else self.calibration

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode.

        Raises:
            PromptError: a prompt cannot be composed.
        """
        asked = [self._prepared(episode) for episode in episodes]
        results = []
        answered = self.model.of(asked, self.prior, self.batch_tokens)
        for episode, shown, found in zip(episodes, asked, answered, strict=True):
            own = found.log_probs
            if self.calibration == "batch":
                own = without_prior(own, own, names_of(shown))
            missing = len(episode.options) - own.shape[1]
            own = np.pad(own, ((0, 0), (0, missing)), constant_values=-np.inf)
            results.append(
                EpisodeScores(
                    own,
                    out_of_scope(own, episode),
                    max(found.shortened),
                    max(found.dropped),
                )
            )
        return results

    def _prepared(self, episode: Episode) -> Episode:
        if not self.offers_none and is_open(episode):
            # The answers of out-of-scope queries point at the option that is gone; nothing here reads answers.
            queries = tuple(query._replace(answer=None) for query in episode.queries)
            episode = replace(episode, options=episode.options[:-1], queries=queries)
        return episode if self.shows_demos else replace(episode, demos=())


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
