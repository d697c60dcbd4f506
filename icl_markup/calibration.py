"""Probabilities that mean something: what labels get without any evidence, how sharp scores are, when to reject.

All of it is applied after the prompts, to log-probabilities: the prior is taken off, the temperature divides, the bias
of "none of the above" is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logit, logsumexp

from icl_markup.errors import EvaluationError
from icl_markup.out_of_scope import choose_threshold
from icl_markup.tasks import NONE_OF_THE_ABOVE

Floats = NDArray[np.float64]
TEMPERATURES = (0.05, 20.0)
"""Temperatures are looked for between these."""

SPREAD = 0.5
"""The standard deviation of a temperature's logarithm, before anything is known of it."""

_LEAST = 1e-12
"""Probabilities are kept so far from 0 and 1."""

_MARGIN = 1e-9
"""By so much at least the log-probability of the answer lies above that of "none of the above", or below it."""


@dataclass(frozen=True)
class Calibration:
    """What was learnt of a classifier's scores.

    Attributes:
        prior: log-probabilities of the labels without evidence, by label; a label that it lacks has the
            logarithm of their mean probability.
        temperature: divides log-probabilities; above 1 makes them less sure (Guo et al. 2017).
        threshold: a query is rejected if its out-of-scope score lies above it; None: the classifier's default.
    """

    prior: dict[str, float] | None = None
    temperature: float = 1.0
    threshold: float | None = None

    def applied(self, log_probs: Floats, names: list[str]) -> Floats:
        """Return log-probabilities with prior and temperature applied.

        Args:
            log_probs: shape (queries, options); -inf where an option was not offered.
            names: the options' names.
        """
        if self.prior:
            # The mean of probabilities, as in `icl_markup.priors.without_prior`: "none of the above" keeps its odds.
            mean = float(logsumexp(list(self.prior.values())) - np.log(len(self.prior)))
            log_probs = log_probs - np.array([self.prior.get(name, mean) for name in names])
        return np.asarray(log_softmax(log_probs / self.temperature, axis=1))

    def with_prior(self, log_probs: Floats, names: list[str]) -> Calibration:
        """Estimate the prior from queries without labels (batch calibration, Zhou et al. 2024).

        A label's prior is its mean probability where it was offered, with one query's weight on an even share: few
        queries say little about a label that was hardly ever offered. "none of the above" has no prior: how many
        queries it fits is no bias of the model.

        Args:
            log_probs: uncalibrated, shape (queries, options); -inf where an option was not offered.
            names: the options' names.

        Raises:
            EvaluationError: there is no query.
        """
        if not len(log_probs):
            raise EvaluationError("no text to estimate the prior from; give some")
        offered = np.isfinite(log_probs)
        share = 1 / offered.sum(axis=1).mean()
        mean = (np.exp(log_probs).sum(axis=0) + share) / (offered.sum(axis=0) + 1)
        prior = {name: float(np.log(p)) for name, p in zip(names, mean, strict=True) if name != NONE_OF_THE_ABOVE}
        return replace(self, prior=prior)

    def with_temperature(self, log_probs: Floats, answers: NDArray[np.intp]) -> Calibration:
        """Choose the temperature that gives labelled queries the least mean log loss.

        Queries whose label was not offered say nothing about it and are passed over. A normal prior of the logarithm
        (mean 0, standard deviation `SPREAD`) keeps a few queries that are all right, or all wrong, from saying too
        much.

        Args:
            log_probs: with the prior taken off, at temperature 1; shape (queries, options).
            answers: the right option of each query, (queries,).

        Raises:
            EvaluationError: no query's label was offered.
        """
        known = np.isfinite(log_probs[np.arange(len(answers)), answers])
        if not known.any():
            raise EvaluationError("no labelled text whose label the prompt offered; give some")
        scores, right = log_probs[known], answers[known]
        rows = np.arange(len(right))

        def loss(log_temperature: float) -> float:
            scaled = scores / np.exp(log_temperature)
            found = float(np.mean(logsumexp(scaled, axis=1) - scaled[rows, right]))
            return found + (log_temperature / SPREAD) ** 2 / 2 / len(right)

        found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-4})
        return replace(self, temperature=float(np.exp(found.x)))

    def with_threshold(self, out_of_scope: Floats, right_inside: NDArray[Any], is_out: NDArray[Any]) -> Calibration:
        """Choose the threshold above which queries are rejected; see `icl_markup.out_of_scope.choose_threshold`."""
        return replace(self, threshold=choose_threshold(out_of_scope, right_inside, is_out))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"prior": self.prior, "temperature": self.temperature, "threshold": self.threshold}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a calibration.
        """
        prior = values["prior"]
        if prior is not None:
            prior = {str(name): float(value) for name, value in prior.items()}
        threshold = values["threshold"]
        found = cls(prior, float(values["temperature"]), None if threshold is None else float(threshold))
        numbers = [found.temperature, *(prior or {}).values(), *([] if threshold is None else [found.threshold])]
        if not np.isfinite(np.array(numbers, dtype=float)).all() or found.temperature <= 0:
            raise ValueError("a calibration holds a number that is not finite, or a temperature that is not positive")
        return found


def out_of_scope(log_probs: Floats, labels: int) -> Floats:
    """Return how little any label fits each query, (queries,).

    Args:
        log_probs: shape (queries, labels), or with "none of the above" in one column more.
        labels: how many labels there are.

    Returns:
        The log-probability of "none of the above" minus the best label's where it is offered, else minus the best
        label's log-probability (Hendrycks & Gimpel 2017).
    """
    best = log_probs[:, :labels].max(axis=1)
    return np.asarray(log_probs[:, labels] - best if log_probs.shape[1] > labels else -best)


def shifted(log_probs: Floats, threshold: float) -> Floats:
    """Shift "none of the above", the last column, so that it wins just where it lay more than `threshold` above."""
    top = log_probs[:, :-1].max(axis=1)
    above = log_probs[:, -1] - top
    scores = log_probs.copy()
    scores[:, -1] = top + np.where(
        above > threshold, np.maximum(above - threshold, _MARGIN), np.minimum(above - threshold, -_MARGIN)
    )
    return np.asarray(log_softmax(scores, axis=1))


def with_rejection(log_probs: Floats, threshold: float) -> Floats:
    """Add a column for "none of the above", which was not offered.

    It is the answer just where minus the best label's log-probability lies above `threshold`. Its odds are in
    proportion to the odds against the best label, so that it is as unlikely as that label is sure.

    Args:
        log_probs: shape (queries, labels).
        threshold: of minus the best label's log-probability.

    Returns:
        Log-probabilities of shape (queries, labels + 1).
    """
    top = log_probs.max(axis=1, keepdims=True)
    best = np.clip(np.exp(top), _LEAST, 1 - _LEAST)
    least = np.clip(np.exp(-threshold), _LEAST, 1 - _LEAST)
    # Equal to the best label's share where best = least; above it just where best < least.
    odds = np.log(least) + logit(least) - logit(best)
    # Rounding, and probabilities next to 1, must not turn what the threshold decides.
    odds = np.where(-top > threshold, np.maximum(odds, top + _MARGIN), np.minimum(odds, top - _MARGIN))
    return np.asarray(log_softmax(np.append(log_probs, odds, axis=1), axis=1))
