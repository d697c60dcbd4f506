"""Intervals cover, tests keep their level, and both know which queries belong together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from icl_markup.errors import EvaluationError
from icl_markup.statistics import Comparison, bootstrap, compare, holm, interval, spread

FAST = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def answers(seed: int, variants: int = 1, queries: int = 60, p: float = 0.7) -> NDArray[np.bool_]:
    return np.asarray(np.random.default_rng(seed).random((variants, queries)) < p)


def clustered(rng: np.random.Generator, episodes: int, size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Correctness whose episodes differ in difficulty; its expectation is 0.5."""
    chance = np.repeat(rng.beta(0.5, 0.5, episodes), size)
    return rng.random(episodes * size) < chance, np.repeat(np.arange(episodes), size)


def test_an_interval_over_episodes_covers_where_one_over_queries_does_not() -> None:
    rng, runs, covered, naively = np.random.default_rng(0), 100, 0, 0
    for _ in range(runs):
        values, episodes = clustered(rng, 40, 5)
        one, naive = interval(values, episodes), interval(values, np.arange(len(values)))
        covered += one.low <= 0.5 <= one.high
        naively += naive.low <= 0.5 <= naive.high
    assert covered >= 0.88 * runs
    assert naively < 0.85 * runs


def test_an_interval_covers_new_variants() -> None:
    rng, runs, covered, fixed = np.random.default_rng(1), 70, 0, 0
    for _ in range(runs):
        chance = rng.uniform(0.4, 0.8, (8, 1))  # the mean over all variants there could be is 0.6
        values = rng.random((8, 60)) < chance
        one, of_these = interval(values, np.arange(60)), interval(values.mean(axis=0), np.arange(60))
        covered += one.low <= 0.6 <= one.high
        fixed += of_these.low <= 0.6 <= of_these.high
    assert covered >= 0.86 * runs
    assert fixed < 0.75 * runs


@given(SEEDS, st.integers(2, 80))
@FAST
def test_one_variant_of_independent_queries_has_wilsons_interval(seed: int, queries: int) -> None:
    values = answers(seed, queries=queries)
    expected = stats.binomtest(int(values.sum()), queries).proportion_ci(method="wilson")
    for episodes in (np.arange(queries), np.zeros(queries, dtype=int)):
        found = interval(values, episodes)
        assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), expected.low, expected.high))
        assert found == interval(values[0], episodes)


def test_a_bootstrap_of_independent_queries_is_near_wilsons_interval() -> None:
    values = answers(3, queries=400)
    low, high = bootstrap(lambda units: units @ values[0] / 400, (400,)).confidence_interval
    wilson = interval(values, np.arange(400))
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


@pytest.mark.parametrize("variants", [1, 4])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_constant_values_are_no_trouble(variants: int, constant: float, size: int) -> None:
    values, episodes = np.full((variants, 12), constant), np.arange(12) // size
    found = interval(values, episodes)
    assert found.mean == constant
    if variants == 1 and size in (1, 12) and constant != 0.1:
        assert 0 < found.high - found.low < 0.3
    else:
        assert found.low == found.high == constant
    same = compare(values, values, episodes)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    if variants > 1:
        assert spread(values, episodes) == spread(values[::-1], episodes)
        assert spread(values, episodes).high == 0


def test_a_mean_counts_queries_equally_whatever_their_episode() -> None:
    values, episodes = np.array([1, 1, 1, 1, 0, 0]), np.array([7, 7, 7, 7, 2, 3])
    assert interval(values, episodes).mean == pytest.approx(4 / 6)
    assert compare(values, 1 - values, episodes).difference == pytest.approx(2 / 6)


@given(SEEDS, st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.sampled_from([1, 4, 60]))
@FAST
def test_comparing_the_other_way_round_changes_the_sign_only(seed: int, of_a: int, of_b: int, size: int) -> None:
    a, b, episodes = answers(seed, of_a), answers(seed + 1, of_b, p=0.6), np.arange(60) // size
    one, other = compare(a, b, episodes, seed), compare(b, a, episodes, seed)
    assert one.difference == -other.difference
    assert (one.p_value, one.test) == (other.p_value, other.test)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.03)
    assert one.low <= one.difference <= one.high
    assert one.difference == pytest.approx(interval(a, episodes).mean - interval(b, episodes).mean)


@given(SEEDS)
@FAST
def test_what_episodes_are_called_and_the_order_of_queries_do_not_matter(seed: int) -> None:
    a, b, episodes = answers(seed, 2), answers(seed + 1, 2), np.repeat(np.arange(12), 5)
    order = np.random.default_rng(seed).permutation(60)
    assert interval(a, episodes) == interval(a[:, order], episodes[order] * 10 + 3)
    assert compare(a, b, episodes) == compare(a[:, order], b[:, order], episodes[order] - 100)


def test_the_permutation_test_keeps_its_level_on_episodes_that_differ_together() -> None:
    rng, low, naively_low, runs = np.random.default_rng(2), 0, 0, 80
    for seed in range(runs):
        a, episodes = clustered(rng, 15, 8)
        b, _ = clustered(rng, 15, 8)
        found = compare(a, b, episodes, seed)
        assert found.test == "paired permutation"
        low += found.p_value <= 0.1
        naively_low += compare(a, b, np.arange(len(a))).p_value <= 0.1
    assert 0.02 * runs <= low <= 0.18 * runs
    assert naively_low > 0.2 * runs


def test_tests_find_differences() -> None:
    for variants, test in ((1, "McNemar"), (3, "paired permutation")):
        found = compare(answers(0, variants, 300, 0.9), answers(1, 2 * variants - 1, 300, 0.6), np.arange(300))
        assert found.test == test
        assert found.p_value < 0.001
        assert 0.15 < found.low < found.high < 0.45


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20))
@FAST
def test_mcnemar_is_a_sign_test_of_the_queries_that_differ(only_a: int, only_b: int, both: int) -> None:
    a = np.r_[np.ones(only_a), np.zeros(only_b), np.ones(both), 0]
    b = np.r_[np.zeros(only_a), np.ones(only_b), np.ones(both), 0]
    found = compare(a, b, np.arange(len(a)))
    assert found.test == "McNemar"
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(expected)


def test_few_episodes_are_permuted_exhaustively() -> None:
    found = compare(np.ones(12), np.zeros(12), np.arange(12) // 2)
    assert found.p_value == pytest.approx(2 / 2**6)


def test_the_seed_alone_decides() -> None:
    a, b, episodes = answers(0, 3), answers(1, 2), np.arange(60) // 2
    assert interval(a, episodes, 5) == interval(a, episodes, 5) != interval(a, episodes, 6)
    assert compare(a, b, episodes, 5) == compare(a, b, episodes, 5) != compare(a, b, episodes, 6)
    assert spread(a, episodes, 5) == spread(a, episodes, 5) != spread(a, episodes, 6)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 40])
def test_holm_steps_down(count: int) -> None:
    p_values = np.random.default_rng(count).beta(0.5, 3, count).round(2).tolist()
    found = holm(p_values)
    assert len(found) == count
    running = 0.0
    for rank, position in enumerate(sorted(range(count), key=p_values.__getitem__)):
        running = max(running, min(1.0, (count - rank) * p_values[position]))
        assert found[position] == pytest.approx(running)


@given(SEEDS, st.integers(2, 6))
@FAST
def test_a_spread_is_the_standard_deviation_of_accuracies(seed: int, choices: int) -> None:
    correct, episodes = answers(seed, choices), np.arange(60) // 3
    found = spread(correct, episodes)
    assert found.mean == pytest.approx(correct.mean(axis=1).std(ddof=1))
    assert 0 <= found.low <= found.mean <= found.high


def test_hard_queries_cancel_out_of_a_spread() -> None:
    hard = answers(0, 1, 200, 0.5)[0]
    found = spread(np.stack([hard, hard, hard]), np.arange(200))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    worse = hard & ~answers(1, 1, 200, 0.2)[0]
    found = spread(np.stack([hard, worse]), np.arange(200))
    assert 0 < found.low < found.high < 0.12  # unpaired, the noise alone would be 0.035 a choice


def test_a_spreads_interval_leaves_sampling_noise_out() -> None:
    rng, runs = np.random.default_rng(3), 40
    equal, apart, expected = 0, 0, np.array([0.5, 0.6, 0.7, 0.8]).std(ddof=1)
    for _ in range(runs):
        equal += spread(rng.random((6, 200)) < 0.7, np.arange(200)).low == 0
        found = spread(rng.random((4, 200)) < np.array([[0.5], [0.6], [0.7], [0.8]]), np.arange(200))
        assert found.low > 0
        apart += found.low <= expected <= found.high
    assert equal >= 0.9 * runs
    assert apart >= 0.88 * runs


BAD: list[tuple[Any, Any, str]] = [
    (np.ones((2, 3)), np.arange(4), "episodes"),
    (np.ones((2, 3)), np.array([0.0, 1.0, 2.0]), "integer"),
    (np.ones((2, 3, 1)), np.arange(3), "shape"),
    (np.ones((0, 3)), np.arange(3), "shape"),
    (np.ones((2, 1)), np.arange(1), "two or more queries"),
    (np.zeros((2, 0)), np.arange(0), "two or more queries"),
    (np.array([[1, np.nan], [0, 0]]), np.arange(2), "finite"),
    (np.array([[1, np.inf], [0, 0]]), np.arange(2), "finite"),
]


@pytest.mark.parametrize(("values", "episodes", "message"), BAD)
def test_unusable_values_are_named(values: Any, episodes: Any, message: str) -> None:
    for call in (interval, spread, lambda v, e: compare(v, v, e)):
        with pytest.raises(EvaluationError, match=message):
            call(values, episodes)


def test_other_errors() -> None:
    with pytest.raises(EvaluationError, match="episodes"):
        compare(np.ones(3), np.ones(4), np.arange(3))
    with pytest.raises(EvaluationError, match="two or more rows"):
        spread(np.ones(3), np.arange(3))
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(EvaluationError, match="p_values"):
            holm([0.5, p])
    with pytest.raises(EvaluationError, match="two or more"):
        bootstrap(lambda a: a[:, 0], (1,))


def test_a_comparison_is_plain_numbers() -> None:
    found = compare(answers(0, 2), answers(1, 2), np.arange(60))
    assert isinstance(found, Comparison)
    assert all(type(number) is float for number in (found.difference, found.low, found.high, found.p_value))
