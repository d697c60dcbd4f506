"""Detection, thresholds, curves and calibration error agree with their definitions and with scikit-learn."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from icl_markup import out_of_scope
from icl_markup.errors import EvaluationError
from icl_markup.out_of_scope import (
    at_threshold,
    choose_threshold,
    confidence_error,
    confusion,
    detection,
    detection_intervals,
    expected_calibration_error,
    risk_coverage,
    roc_points,
)

FAST = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def data(seed: int, queries: int = 80, levels: int | None = None) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Scores (of few levels, where given), what is out of scope, and what would be answered rightly."""
    rng = np.random.default_rng(seed)
    is_out = rng.permutation(np.arange(queries) < max(1, queries // 3))
    score = rng.normal(size=queries) + is_out
    if levels:
        score = np.round(score * levels / 4)
    return score, is_out, rng.random(queries) < 0.8


@given(SEEDS, st.integers(3, 80), st.sampled_from([None, 3]))
@FAST
def test_detection_agrees_with_its_definition(seed: int, queries: int, levels: int | None) -> None:
    score, is_out, _ = data(seed, queries, levels)
    found = detection(score, is_out)
    above = score[is_out][:, None] - score[~is_out]
    assert found.auroc == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())
    assert found.auroc == pytest.approx(roc_auc_score(is_out, score))
    assert found.aupr == pytest.approx(average_precision_score(is_out, score))
    rates = [(score[~is_out] >= t).mean() for t in score if (score[is_out] >= t).mean() >= 0.95]
    assert found.fpr_at_95_tpr == pytest.approx(min(rates))


@given(SEEDS, st.sampled_from([None, 3]))
@FAST
def test_reversed_scores_and_rescaled_ones(seed: int, levels: int | None) -> None:
    score, is_out, _ = data(seed, levels=levels)
    assert detection(-score, is_out).auroc == pytest.approx(1 - detection(score, is_out).auroc)
    assert detection(np.exp(score), is_out) == detection(score, is_out)
    perfect = detection(is_out * 1.0, is_out)
    assert (perfect.auroc, perfect.aupr, perfect.fpr_at_95_tpr) == (1, 1, 0)
    assert detection(np.zeros(80), is_out).auroc == 0.5


@pytest.mark.parametrize("size", [1, 4, 80])
def test_detection_intervals(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_scope, "RESAMPLES", 100)
    score, is_out, _ = data(0)
    episodes = np.arange(80) // size
    found = detection_intervals(score, is_out, episodes)
    measured = detection(score, is_out)
    assert set(found) == {"auroc", "aupr", "fpr_at_95_tpr"}
    for name, estimate in found.items():
        assert estimate.mean == getattr(measured, name)
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert estimate.low < estimate.high
    assert found == detection_intervals(score, is_out, episodes) != detection_intervals(score, is_out, episodes, 1)


def test_a_bootstrap_keeps_both_classes_however_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_scope, "RESAMPLES", 50)
    rng = np.random.default_rng(0)
    for out in (1, 2):
        is_out = np.arange(40) < out
        for episodes in (np.arange(40), np.arange(40) // 4, np.zeros(40, dtype=int)):
            found = detection_intervals(rng.normal(size=40), is_out, episodes)
            assert all(np.isfinite([one.low, one.high]).all() for one in found.values())
    with pytest.raises(EvaluationError, match="two or more"):
        detection_intervals([0.1, 0.2], [True, False], [0, 1])


def test_queries_of_an_episode_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_scope, "RESAMPLES", 100)
    score, is_out, _ = data(1, 60)
    repeated = [np.repeat(values, 6) for values in (score, is_out, np.arange(60))]
    together, apart = detection_intervals(*repeated)["auroc"], detection_intervals(*repeated[:2], np.arange(360))
    assert together.high - together.low > 1.5 * (apart["auroc"].high - apart["auroc"].low)


@given(SEEDS, st.integers(3, 40), st.sampled_from([None, 3]))
@FAST
def test_the_chosen_threshold_is_the_best(seed: int, queries: int, levels: int | None) -> None:
    score, is_out, right = data(seed, queries, levels)

    def gain(threshold: float) -> float:
        found = at_threshold(score, right, is_out, threshold)
        return (found.in_scope_accuracy + found.oos_recall) / 2

    chosen = choose_threshold(score, right, is_out)
    assert np.isfinite(chosen)
    best = max(gain(t) for t in [-1e9, *score])
    assert gain(chosen) == pytest.approx(best)
    assert all(gain(t) < best - 1e-12 for t in np.unique(score) if t > chosen)
    # What an out-of-scope query would have been answered makes no difference.
    assert choose_threshold(score, right ^ is_out, is_out) == chosen


def test_threshold_examples() -> None:
    score, is_out, right = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
    assert choose_threshold(score, right, is_out) == pytest.approx(0.5)
    found = at_threshold(score, right, is_out, 0.5)
    assert (found.in_scope_accuracy, found.oos_recall, found.accuracy) == (1, 1, 1)
    found = at_threshold(score, right, is_out, 0.1)
    assert (found.in_scope_accuracy, found.oos_recall, found.accuracy) == (0.5, 1, 0.75)
    # Nothing in scope is answered rightly: all is rejected. All is accepted where scores are useless and answers right.
    assert choose_threshold(score, np.zeros(4), is_out) < 0.8
    assert choose_threshold(-score, right, is_out) == -0.1


@given(SEEDS)
@FAST
def test_accuracy_is_the_weighted_mean_of_both(seed: int) -> None:
    score, is_out, right = data(seed)
    found = at_threshold(score, right, is_out, 0.3)
    share = is_out.mean()
    assert found.accuracy == pytest.approx((1 - share) * found.in_scope_accuracy + share * found.oos_recall)


@given(SEEDS, st.integers(2, 80), st.sampled_from([3, 300]), st.sampled_from([None, 3]))
@FAST
def test_curves_keep_their_ends_and_few_points(seed: int, points: int, queries: int, levels: int | None) -> None:
    score, is_out, right = data(seed, queries, levels)
    x, y = roc_points(score, is_out, points)
    assert len(x) == len(y) <= points
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(zip(x, y, strict=True)))
    x, y = risk_coverage(score, right, points)
    assert len(x) == len(y) <= points
    assert sorted(set(x)) == x
    assert x[-1] == 1
    assert y[-1] == pytest.approx(1 - right.mean())
    surest = score == score.max()
    assert (x[0], y[0]) == pytest.approx((surest.mean(), 1 - right[surest].mean()))


@given(SEEDS, st.integers(2, 60), st.sampled_from([None, 3]))
@FAST
def test_every_risk_is_that_of_the_queries_above_some_confidence(seed: int, queries: int, levels: int | None) -> None:
    confidence, _, right = data(seed, queries, levels)
    by_level = [confidence >= level for level in np.unique(confidence)[::-1]]
    x, y = risk_coverage(confidence, right)
    assert x == pytest.approx([kept.mean() for kept in by_level])
    assert y == pytest.approx([1 - right[kept].mean() for kept in by_level])


def test_a_thinned_roc_curve_has_the_same_area() -> None:
    score, is_out, _ = data(0, 3000)
    x, y = roc_points(score, is_out)
    assert len(x) == 60
    assert np.trapezoid(y, x) == pytest.approx(detection(score, is_out).auroc, abs=0.005)


def test_calibration_error() -> None:
    sure = np.tile([0.9, 0.1], (10, 1))
    assert expected_calibration_error(sure, [0] * 9 + [1]) == pytest.approx(0)
    assert expected_calibration_error(sure, [0] * 10) == pytest.approx(0.1)
    assert expected_calibration_error(sure, [1] * 10) == pytest.approx(0.9)
    # Two bins: over- and under-confidence do not cancel across bins, but do within one.
    both = np.r_[np.tile([0.9, 0.1], (10, 1)), np.tile([0.6, 0.4], (10, 1))]
    answers = [0] * 6 + [1] * 4 + [0] * 9 + [1]
    assert expected_calibration_error(both, answers) == pytest.approx(0.3)
    assert expected_calibration_error(both, answers, bins=1) == pytest.approx(0)


@given(SEEDS, st.integers(1, 20))
@FAST
def test_calibration_error_agrees_with_its_definition(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet([0.5] * 3, 100)
    answers = rng.integers(0, 3, 100)
    confidence, correct, expected = rows.max(axis=1), rows.argmax(axis=1) == answers, 0.0
    for low, high in itertools.pairwise(np.linspace(0, 1, bins + 1)):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(rows, answers, bins) == pytest.approx(expected)
    assert expected_calibration_error(np.eye(3)[answers], answers, bins) == 0


LABELS = st.lists(st.text(max_size=4), min_size=1, max_size=5, unique=True)


@given(LABELS, st.data())
@FAST
def test_confusion_counts_pairs(labels: list[str], draw: st.DataObject) -> None:
    pairs = draw.draw(st.lists(st.tuples(st.sampled_from(labels), st.sampled_from(labels)), max_size=30))
    found = confusion([a for a, _ in pairs], [b for _, b in pairs], labels)
    assert found == [[pairs.count((a, b)) for b in labels] for a in labels]
    assert all(type(count) is int for row in found for count in row)


def test_errors_name_the_argument() -> None:
    score, is_out, right = data(0, 10)
    for missing, kind in ((np.zeros(10), "out of scope"), (np.ones(10), "in scope")):
        calls = (
            lambda m: detection(score, m),
            lambda m: detection_intervals(score, m, np.arange(10)),
            lambda m: roc_points(score, m),
            lambda m: choose_threshold(score, right, m),
            lambda m: at_threshold(score, right, m, 0.0),
        )
        for call in calls:
            with pytest.raises(EvaluationError, match=f"no query is {kind}"):
                call(missing)
    bad: list[tuple[Any, str]] = [
        (lambda: detection(score[:9], is_out), "is_out"),
        (lambda: detection(score, np.arange(10)), "is_out"),
        (lambda: detection(np.where(is_out, np.nan, score), is_out), "score"),
        (lambda: detection([], []), "score"),
        (lambda: detection_intervals(score, is_out, np.arange(9)), "episodes"),
        (lambda: choose_threshold(score, right[:9], is_out), "correct_in_scope"),
        (lambda: at_threshold(score, right, is_out, float("nan")), "threshold"),
        (lambda: roc_points(score, is_out, 1), "points"),
        (lambda: risk_coverage(score, right, 1), "points"),
        (lambda: risk_coverage(score * np.inf, right), "confidence"),
        (lambda: risk_coverage(score, right[:9]), "correct"),
        (lambda: expected_calibration_error([[0.5, 0.4]], [0]), "probabilities"),
        (lambda: expected_calibration_error([[np.nan, 0.4]], [0]), "probabilities"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [0, 1]), "answers"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [2]), "answers"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [0], bins=0), "bins"),
        (lambda: confusion(["a"], [], ["a"]), "predicted"),
        (lambda: confusion(["a"], ["b"], ["a"]), "'b'"),
        (lambda: confusion([], [], []), "labels"),
        (lambda: confusion(["a"], ["a"], ["a", "a"]), "labels"),
    ]
    for call, name in bad:
        with pytest.raises(EvaluationError, match=name):
            call()


@given(SEEDS)
@FAST
def test_the_error_of_confidences_is_that_of_the_distributions_they_come_from(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.ones(5), size=60)
    answers = rng.integers(0, 5, size=60)
    error = confidence_error(rows.max(axis=1), rows.argmax(axis=1) == answers)
    assert error == expected_calibration_error(rows, answers)


def test_a_confidence_below_one_half_is_no_confidence_in_something_else() -> None:
    assert confidence_error([0.3] * 10, [True] * 3 + [False] * 7) == pytest.approx(0)
    assert confidence_error([0.3] * 10, [True] * 10) == pytest.approx(0.7)
