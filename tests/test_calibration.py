"""Calibration: a prior without labels, a temperature, a threshold, and what they do to probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from icl_markup.calibration import Calibration, out_of_scope, shifted, with_rejection
from icl_markup.errors import EvaluationError
from icl_markup.out_of_scope import expected_calibration_error
from icl_markup.priors import without_prior
from icl_markup.tasks import NONE_OF_THE_ABOVE

NAMES = ["a", "b", "c"]


def drawn(seed: int, queries: int = 400, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose softmax at temperature `sharpness` is the true distribution of the answers."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(queries, 3)) * 2
    truth = np.exp(log_softmax(logits, axis=1))
    answers = np.array([rng.choice(3, p=p) for p in truth], dtype=np.intp)
    return log_softmax(logits * sharpness, axis=1), answers


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_wrong_sharpness(sharpness: float) -> None:
    scores, answers = drawn(0, 4000, sharpness)
    found = Calibration().with_temperature(scores, answers)
    assert found.temperature == pytest.approx(sharpness, rel=0.15)
    before = expected_calibration_error(np.exp(scores), answers)
    after = expected_calibration_error(np.exp(found.applied(scores, NAMES)), answers)
    assert after < 0.05
    assert after <= before + 0.01


def test_a_prior_is_taken_off() -> None:
    scores, _ = drawn(1, 4000)
    biased = log_softmax(scores + np.array([2.0, 0.0, -1.0]), axis=1)
    found = Calibration().with_prior(biased, NAMES)
    mean = np.exp(found.applied(biased, NAMES)).mean(axis=0)
    assert np.ptp(mean) < 0.5 * np.ptp(np.exp(biased).mean(axis=0))


def test_labels_that_were_not_offered_stay_impossible_and_unknown_ones_have_the_mean() -> None:
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([[0.7, 0.3, 0.0], [0.5, 0.5, 0.0]]))
    found = Calibration().with_prior(scores, NAMES)
    assert found.prior is not None
    applied = found.applied(scores, NAMES)
    assert np.isneginf(applied[:, 2]).all()
    assert np.exp(applied).sum(axis=1) == pytest.approx(1)
    other = found.applied(np.log(np.full((1, 3), 1 / 3)), ["a", "b", "new"])
    assert np.isfinite(other).all()
    with pytest.raises(EvaluationError, match="no text"):
        Calibration().with_prior(scores[:0], NAMES)
    with pytest.raises(EvaluationError, match="offered"):
        Calibration().with_temperature(scores, np.array([2, 2]))


@given(st.integers(0, 10_000), st.floats(0.01, 5))
def test_rejection_is_the_answer_just_above_the_threshold(seed: int, threshold: float) -> None:
    scores, _ = drawn(seed, 30)
    odd = out_of_scope(scores, 3)
    found = with_rejection(scores, threshold)
    assert np.exp(found).sum(axis=1) == pytest.approx(1)
    assert ((found.argmax(axis=1) == 3) == (odd > threshold)).all()
    for exact in odd:
        assert ((with_rejection(scores, exact).argmax(axis=1) == 3) == (odd > exact)).all()
    order = np.argsort(odd)
    assert (np.diff(found[order, 3]) >= -1e-9).all(), "the less any label fits, the more likely"
    np.testing.assert_allclose(log_softmax(found[:, :3], axis=1), scores, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(-5, 5))
def test_a_shift_moves_the_odds_of_the_last(seed: int, threshold: float) -> None:
    scores, _ = drawn(seed, 30)
    found = shifted(scores, threshold)
    odd = out_of_scope(scores, 2)
    assert ((found.argmax(axis=1) == 2) == (odd > threshold)).all()
    for exact in odd:
        assert ((shifted(scores, exact).argmax(axis=1) == 2) == (odd > exact)).all()


@pytest.mark.parametrize("right", [True, False])
def test_four_queries_do_not_settle_a_temperature(right: bool) -> None:
    scores = log_softmax(np.array([[1.5, 0.0, 0.0]] * 4), axis=1)
    found = Calibration().with_temperature(scores, np.full(4, 0 if right else 1))
    assert 0.3 < found.temperature < 3
    assert (found.temperature < 1) == right


@pytest.mark.parametrize(
    "bad", [{"temperature": 0}, {"temperature": "nan"}, {"prior": {"a": "inf"}}, {"threshold": "nan"}]
)
def test_what_is_no_calibration_is_refused(bad: dict[str, object]) -> None:
    good = Calibration({"a": -1.0}, 2.0, 0.5)
    assert Calibration.from_json(good.to_json()) == good
    with pytest.raises(ValueError, match="finite"):
        Calibration.from_json({**good.to_json(), **bad})


def test_none_of_the_above_keeps_its_odds_in_classifiers_as_in_experiments() -> None:
    names = ["weather", "lost card", "refund", NONE_OF_THE_ABOVE]
    rng = np.random.default_rng(0)
    sample = log_softmax(rng.normal(size=(50, 4)) + np.array([3.0, 0.0, -3.0, 0.0]), axis=1)
    labels = log_softmax(np.logaddexp.reduce(sample[:, :3], axis=0))
    prior = dict(zip(names, labels.tolist(), strict=False))
    assert Calibration(prior).applied(sample, names) == pytest.approx(without_prior(sample, sample, names))
