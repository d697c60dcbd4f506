"""What every method of an experiment is: something that scores the options of the queries of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from icl_markup.episodes import Episode


@dataclass(frozen=True)
class EpisodeScores:
    """One episode's answers.

    Attributes:
        log_probs: a score for each option of each query, of which a softmax gives probabilities; shape
            (queries, options); -inf where a method rules an option out.
        out_of_scope: how little any offered option fits each query, on a scale of the method's own; shape (queries,).
        shortened: demonstrations that were shortened to fit a prompt, over all prompts.
        dropped: demonstrations that were left out of a prompt to fit.
    """

    log_probs: NDArray[np.float64]
    out_of_scope: NDArray[np.float64]
    shortened: int = 0
    dropped: int = 0


class Method(Protocol):
    """Scores queries; the same episodes are given to every method, so that answers can be compared in pairs."""

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        ...
