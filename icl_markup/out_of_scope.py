"""Out-of-scope queries and confidence: how well a score separates them, thresholds, curves, calibration error.

Throughout, out-of-scope is the positive class and a larger score means more likely out of scope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.metrics import auc, average_precision_score, confusion_matrix, roc_curve

from icl_markup.errors import EvaluationError
from icl_markup.evaluation import Estimate
from icl_markup.statistics import bootstrap, grouped

RESAMPLES = 1000
"""Bootstrap samples for detection; each costs about a millisecond, as `sklearn.metrics` takes them one at a time."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Detection:
    """How well a score tells out-of-scope queries from others, whatever the threshold.

    Attributes:
        auroc: area under the ROC curve, the probability that an out-of-scope query scores above another one.
        aupr: average precision; a random score has the share of out-of-scope queries.
        fpr_at_95_tpr: the smallest share of in-scope queries rejected where at least 95 % of the out-of-scope ones are.
    """

    auroc: float
    aupr: float
    fpr_at_95_tpr: float


@dataclass(frozen=True)
class Thresholded:
    """What a threshold gives; queries whose score lies above it are rejected as out of scope.

    Attributes:
        in_scope_accuracy: share of in-scope queries that are accepted and answered rightly.
        oos_recall: share of out-of-scope queries that are rejected.
        accuracy: share of all queries that are dealt with rightly in these two ways.
    """

    in_scope_accuracy: float
    oos_recall: float
    accuracy: float


def detection(score: ArrayLike, is_out: ArrayLike) -> Detection:
    """Measure detection (`sklearn.metrics`).

    Args:
        score: shape (queries,), larger = more likely out of scope.
        is_out: which queries are out of scope, shape (queries,), bool.

    Raises:
        EvaluationError: shapes differ, a score is not finite, or a class has no query.
    """
    return _detection(*_checked(score, is_out))


def detection_intervals(score: ArrayLike, is_out: ArrayLike, episodes: ArrayLike, seed: int = 0) -> dict[str, Estimate]:
    """Measure detection with 95 % intervals, from a percentile bootstrap.

    Episodes are resampled (queries, where there is only one episode) in strata: those whose queries are all in scope,
    those whose queries are all out of scope, and those with both, each as many times as there are. So no sample lacks
    a class, and where an episode has one query the classes keep their sizes. A stratum of a single episode is held
    fixed: the interval leaves its variation out.

    Args:
        score: shape (queries,), larger = more likely out of scope.
        is_out: which queries are out of scope, shape (queries,), bool.
        episodes: which episode each query belongs to; integers of shape (queries,).
        seed: seeds the bootstrap.

    Returns:
        An estimate for ``"auroc"``, ``"aupr"`` and ``"fpr_at_95_tpr"``.

    Raises:
        EvaluationError: as `detection`, or no stratum has two episodes.
    """
    scores, out = _checked(score, is_out)
    unit = grouped(episodes, len(scores))
    share_out = np.bincount(unit, weights=out) / np.bincount(unit)
    strata = [np.flatnonzero(of) for of in (share_out == 0, share_out == 1, (share_out > 0) & (share_out < 1))]
    strata = [stratum for stratum in strata if len(stratum)]
    order = np.argsort(np.concatenate(strata))

    def measures(*weights: Floats) -> Floats:
        by_query = np.concatenate(weights, axis=1)[:, order[unit]]
        with config_context(assume_finite=True, skip_parameter_validation=True):  # checked once, above
            found = [_detection(scores, out, row) for row in by_query]
        return np.array([list(asdict(one).values()) for one in found]).T

    found = bootstrap(measures, [len(stratum) for stratum in strata], seed=seed, resamples=RESAMPLES)
    means = asdict(_detection(scores, out))
    return {
        name: Estimate(mean, float(low), float(high))
        for (name, mean), low, high in zip(means.items(), *found.confidence_interval, strict=True)
    }


def choose_threshold(score: ArrayLike, correct_in_scope: ArrayLike, is_out: ArrayLike) -> float:
    """Choose the threshold above which a query is rejected. Give it queries of the VALIDATION split only.

    It maximises the mean of in-scope accuracy and out-of-scope recall, so that neither class counts for more because
    it has more queries, in validation or in test. Candidates lie half-way between neighbouring scores, just below
    the smallest (reject all) and at the largest (accept all). Among equals the largest wins, which rejects fewest.

    Args:
        score: shape (queries,), larger = more likely out of scope.
        correct_in_scope: whether each query would be answered rightly if accepted, shape (queries,); ignored where
            `is_out`.
        is_out: which queries are out of scope, shape (queries,), bool.

    Raises:
        EvaluationError: shapes differ, a score is not finite, or a class has no query.
    """
    scores, out = _checked(score, is_out)
    right = _booleans(correct_in_scope, "correct_in_scope", len(scores)) & ~out
    levels = np.unique(scores)
    candidates = np.r_[np.nextafter(levels[0], -np.inf), levels[:-1] / 2 + levels[1:] / 2, levels[-1]]
    kept_right = np.searchsorted(np.sort(scores[right]), candidates, side="right")
    rejected_out = out.sum() - np.searchsorted(np.sort(scores[out]), candidates, side="right")
    # Both shares over one denominator: whole numbers, so that ties are exact.
    gain = kept_right * int(out.sum()) + rejected_out * int((~out).sum())
    return float(candidates[np.flatnonzero(gain == gain.max())[-1]])


def at_threshold(score: ArrayLike, correct_in_scope: ArrayLike, is_out: ArrayLike, threshold: float) -> Thresholded:
    """Measure what a threshold gives; arguments and errors as `choose_threshold`, and a NaN threshold is an error."""
    scores, out = _checked(score, is_out)
    right = _booleans(correct_in_scope, "correct_in_scope", len(scores))
    if np.isnan(threshold):
        raise EvaluationError("threshold is not a number; take it from choose_threshold")
    dealt_with = np.where(out, scores > threshold, right & (scores <= threshold))
    return Thresholded(float(dealt_with[~out].mean()), float(dealt_with[out].mean()), float(dealt_with.mean()))


def roc_points(score: ArrayLike, is_out: ArrayLike, points: int = 60) -> tuple[list[float], list[float]]:
    """Return false-positive and true-positive rates of a ROC curve, (0, 0) to (1, 1), at most `points` of them.

    Raises:
        EvaluationError: as `detection`, or `points` is below 2.
    """
    x, y, _ = roc_curve(*_checked(score, is_out)[::-1])
    return _thinned(x, y, x + y, points)


def risk_coverage(confidence: ArrayLike, correct: ArrayLike, points: int = 60) -> tuple[list[float], list[float]]:
    """Return coverages and risks where only the most confident queries are answered (El-Yaniv and Wiener 2010, JMLR).

    Risk is the share of wrong answers among those given. Queries of equal confidence are answered together or not at
    all, since no threshold parts them. The last point has coverage 1 and the error rate as its risk.

    Args:
        confidence: shape (queries,), finite.
        correct: whether each query was answered rightly, shape (queries,).
        points: at most so many are returned, even in coverage, both ends among them.

    Raises:
        EvaluationError: shapes differ, there are no queries, a confidence is not finite, or `points` is below 2.
    """
    sure = _finite(confidence, "confidence")
    wrong = ~_booleans(correct, "correct", len(sure))
    order = np.argsort(-sure, kind="stable")
    last_of_level = np.flatnonzero(np.diff(sure[order], append=-np.inf))
    answered = last_of_level + 1
    coverage = answered / len(sure)
    return _thinned(coverage, np.cumsum(wrong[order])[last_of_level] / answered, coverage, points)


def expected_calibration_error(probabilities: ArrayLike, answers: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error of the most probable option (Guo et al. 2017, equation 3).

    Args:
        probabilities: shape (queries, options), each row a distribution.
        answers: the index of each query's right option, shape (queries,).
        bins: how many bins of equal width confidence is parted into, each closed on the right.

    Returns:
        The mean over queries of the distance between accuracy and confidence in their bin, 0..1.

    Raises:
        EvaluationError: shapes do not fit, a row is not a distribution, an answer is no option, or `bins` is below 1.
    """
    rows, right = np.asarray(probabilities, dtype=np.float64), np.asarray(answers)
    if rows.ndim != 2 or not rows.size or right.shape != rows.shape[:1] or right.dtype.kind not in "iu":
        raise EvaluationError(
            "probabilities must have shape (queries, options) and answers hold one integer a query; "
            f"their shapes are {rows.shape} and {right.shape}"
        )
    if not (rows >= 0).all() or not np.allclose(rows.sum(axis=1), 1, atol=1e-4):
        raise EvaluationError("probabilities must be at least 0 and add up to 1 in each row; apply a softmax first")
    if right.min() < 0 or right.max() >= rows.shape[1]:
        raise EvaluationError(f"answers must lie between 0 and {rows.shape[1] - 1}, the last option")
    if bins < 1:
        raise EvaluationError(f"bins must be at least 1, and is {bins}")
    return confidence_error(rows.max(axis=1), rows.argmax(axis=1) == right, bins)


def confidence_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return `expected_calibration_error` of known confidences.

    Args:
        confidence: the probability of the option that was chosen, 0..1, shape (queries,).
        correct: whether it was right, bool, shape (queries,).
        bins: as there.
    """
    sure, right = _finite(confidence, "confidence"), np.asarray(correct, dtype=np.float64)
    bin_of = np.digitize(sure, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return float(np.abs(np.bincount(bin_of, weights=right - sure)).sum() / len(sure))


def confusion(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count answers (`sklearn.metrics.confusion_matrix`): a row for each true label, a column for each predicted one.

    Raises:
        EvaluationError: lengths differ, `labels` is empty or names one twice, or a label is not among `labels`.
    """
    if len(truth) != len(predicted):
        raise EvaluationError(f"truth holds {len(truth)} labels, but predicted {len(predicted)}; give one a query")
    if not labels or len(set(labels)) < len(labels):
        raise EvaluationError("labels must name at least one label, and each one once")
    unknown = sorted({*truth, *predicted} - set(labels))
    if unknown:
        raise EvaluationError(f"labels lacks {unknown[0]!r}, which truth or predicted holds; add it")
    if not truth or len(labels) == 1:  # scikit-learn refuses the one and warns at the other
        return [[len(truth)] * len(labels) for _ in labels]
    position = {label: index for index, label in enumerate(labels)}  # indices: a label may be any text
    counts = confusion_matrix(
        [position[label] for label in truth], [position[label] for label in predicted], labels=range(len(labels))
    )
    return [[int(count) for count in row] for row in counts]


def _detection(score: Floats, is_out: Bools, weights: Floats | None = None) -> Detection:
    # Every point is kept: dropping collinear ones could drop the first at which 95 % are found.
    fpr, tpr, _ = roc_curve(is_out, score, sample_weight=weights, drop_intermediate=False)
    # Weighted rates carry rounding errors, which must not decide whether 95 % are reached.
    at_95 = float(fpr[np.argmax(tpr >= 0.95 - 1e-12)])
    return Detection(float(auc(fpr, tpr)), float(average_precision_score(is_out, score, sample_weight=weights)), at_95)


def _thinned(x: Floats, y: Floats, along: Floats, points: int) -> tuple[list[float], list[float]]:
    """Keep at most `points` of a curve, nearest to even steps of the rising `along`, with both ends."""
    if points < 2:
        raise EvaluationError(f"points must be at least 2, for the ends, and is {points}")
    if len(x) > points:
        kept = np.unique(np.searchsorted(along, np.linspace(along[0], along[-1], points)).clip(max=len(x) - 1))
        x, y = x[kept], y[kept]
    return [float(value) for value in x], [float(value) for value in y]


def _finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise EvaluationError(f"{name} must have shape (queries,) and hold values; its shape is {array.shape}")
    if not np.isfinite(array).all():
        raise EvaluationError(f"{name} holds values that are not finite; bound them first")
    return array


def _booleans(values: ArrayLike, name: str, queries: int) -> Bools:
    array = np.asarray(values)
    if array.shape != (queries,) or not np.isin(array, (0, 1)).all():
        raise EvaluationError(
            f"{name} must say true or false for each of {queries} queries; its shape is {array.shape}"
        )
    return array.astype(bool)


def _checked(score: ArrayLike, is_out: ArrayLike) -> tuple[Floats, Bools]:
    scores = _finite(score, "score")
    out = _booleans(is_out, "is_out", len(scores))
    if out.all() or not out.any():
        missing = "in scope" if out.all() else "out of scope"
        raise EvaluationError(f"is_out says that no query is {missing}; detection needs queries of both kinds")
    return scores, out
