"""Statistics of paired answers: intervals, tests, correction for many comparisons, spread over choices.

Queries of one episode share its options and demonstrations, so they are not independent: what is resampled
is the episode. Where every query belongs to one episode (a whole test set answered with the same demonstrations),
no second set of demonstrations exists to tell how much they matter; queries are resampled instead, and the result
holds for these demonstrations only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from icl_markup.errors import EvaluationError
from icl_markup.evaluation import Estimate

RESAMPLES = 2000
PERMUTATIONS = 20000

_BATCH_VALUES = 1_000_000
"""Numbers drawn at a time, which bounds memory at some tens of MB whatever the number of queries."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """How two methods differ on the same queries.

    Attributes:
        difference: the mean of the first minus the mean of the second.
        low: the lower end of the difference's 95 % interval.
        high: its upper end.
        p_value: two-sided, of the hypothesis that exchanging the methods' answers changes nothing.
        test: what gave `p_value`: ``"McNemar"`` or ``"paired permutation"``.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str


def interval(values: ArrayLike, episodes: ArrayLike, seed: int = 0) -> Estimate:
    """Estimate a mean over queries with its 95 % interval.

    For one variant whose values are 0 or 1 and whose queries are independent (one an episode, or all of one episode),
    the interval is Wilson's, which keeps its coverage near 0 and 1. Otherwise it is a percentile bootstrap
    (`scipy.stats.bootstrap`) that resamples episodes and, independently, variants: the pigeonhole bootstrap
    of crossed factors (Owen 2007, Annals of Applied Statistics 1(2)). It is approximate below some twenty episodes, and
    says little about variants where there are only two or three.

    Args:
        values: a number a query, for instance 0 or 1 for a wrong or right answer; shape (variants, queries) where
            several wordings or warm-up seeds answered the same queries, or (queries,).
        episodes: which episode each query belongs to; integers of shape (queries,). Where all are equal,
            queries are resampled in place of episodes, and the interval leaves out the variation over demonstrations.
        seed: seeds the bootstrap.

    Returns:
        The mean over all variants and queries, and its interval; of zero width where a bootstrap's data are constant.

    Raises:
        EvaluationError: shapes do not fit, there are fewer than two queries, or a value is not finite.
    """
    table = _table(values, episodes, "values")
    if table.is_binary_sample:
        found = stats.binomtest(int(table.sums.sum()), int(table.sizes.sum())).proportion_ci(method="wilson")
        return Estimate(table.mean, float(found.low), float(found.high))
    if table.constant:
        return Estimate(table.mean, table.mean, table.mean)
    ends = bootstrap(table.means, (table.units, table.variants), seed=seed).confidence_interval
    return Estimate(table.mean, float(ends.low), float(ends.high))


def compare(a: ArrayLike, b: ArrayLike, episodes: ArrayLike, seed: int = 0) -> Comparison:
    """Compare two methods on the same queries.

    The interval is a percentile bootstrap over episodes, the same ones for both methods, and over each
    method's variants, independently for the two; where variants correspond in pairs that makes it
    wider than it need be. The p-value is McNemar's exact test (`statsmodels`) where each method has one variant, values
    are 0 or 1, and queries are independent (one an episode, or all of one episode). Otherwise it is a paired
    permutation test (`scipy.stats.permutation_test`): the methods' means over variants are exchanged within episodes at
    random. It speaks of new episodes for the variants at hand, the interval of new variants too; the two can disagree
    where variants are few or far apart.

    Args:
        a: the first method's values, shape (variants of it, queries) or (queries,); larger is not taken as better.
        b: the second method's, shape (variants of it, queries) or (queries,), the same queries in the same order.
        episodes: which episode each query belongs to; integers of shape (queries,). Where all are equal, queries take
            the place of episodes.
        seed: seeds the bootstrap and the permutations.

    Returns:
        The difference of the means over all queries; p is 1 where no episode tells the methods apart.

    Raises:
        EvaluationError: shapes do not fit, there are fewer than two queries, or a value is not finite.
    """
    first, second = _table(a, episodes, "a"), _table(b, episodes, "b")
    difference = first.mean - second.mean
    if first.constant and second.constant:
        low, high = difference, difference
    else:
        ends = bootstrap(
            lambda units, of_a, of_b: first.means(units, of_a) - second.means(units, of_b),
            (first.units, first.variants, second.variants),
            seed=seed,
        ).confidence_interval
        low, high = float(ends.low), float(ends.high)
    if first.is_binary_sample and second.is_binary_sample:
        right, against = first.sums[0] > 0, second.sums[0] > 0
        agreement = [[(right & against).sum(), (right & ~against).sum()], [(~right & against).sum(), 0]]
        return Comparison(difference, low, high, float(mcnemar(agreement, exact=True).pvalue), "McNemar")
    # Sums scaled to a common number of variants: whole numbers where values are 0 or 1, so that ties are exact.
    by_unit = first.sums.sum(axis=0) * second.variants - second.sums.sum(axis=0) * first.variants
    return Comparison(difference, low, high, _sign_flip_p(by_unit, seed), "paired permutation")


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one family of comparisons by Holm's step-down procedure (`statsmodels`).

    Raises:
        EvaluationError: a p-value lies outside 0..1.
    """
    if not all(0 <= p <= 1 for p in p_values):  # false for NaN too
        raise EvaluationError(f"p_values must lie between 0 and 1, and are {list(p_values)}")
    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def spread(correct: ArrayLike, episodes: ArrayLike, seed: int = 0) -> Estimate:
    """Estimate how far accuracy varies over choices (wordings, orders, seeds) that answered the same queries.

    The standard deviation is a paired one: how hard the queries are cancels out. What does not cancel is chance in
    which queries a choice gets right. So the value lies above 0 even for choices that are equally good, by about the
    square root of p (1 - p) / queries where their errors are unrelated. A bootstrap sample adds that noise once more,
    and its percentiles lie too high, often above the value itself. The interval is therefore the percentile
    bootstrap's of the variance (`scipy.stats.bootstrap`), lowered by twice the noise, which is estimated as the
    bootstrap's mean variance less the variance found, and cut at 0. In simulations of 2 to 12 choices and 50 or 300
    queries it held the standard deviation without noise in 94 % of cases or more. A low end of 0 says that noise may be
    all there is.

    Args:
        correct: whether each choice answered each query rightly, shape (choices, queries); any finite numbers do.
        episodes: which episode each query belongs to; integers of shape (queries,). Where all are equal,
            queries are resampled in place of episodes.
        seed: seeds the bootstrap.

    Returns:
        The standard deviation (with choices - 1 in the denominator) over choices of the mean over queries.

    Raises:
        EvaluationError: shapes do not fit, there are fewer than two choices or two queries, or a value is not finite.
    """
    table = _table(correct, episodes, "correct")
    if table.variants < 2:
        raise EvaluationError("correct holds one choice; a spread needs two or more rows")

    def variances(units: Floats) -> Floats:
        # A variance of numbers that are equal but for rounding is not quite 0; its square root would be visible.
        return np.asarray((units @ table.sums.T / (units @ table.sizes)[:, None]).round(12).var(axis=-1, ddof=1))

    variance = float(variances(np.ones((1, table.units)))[0])
    value = float(np.sqrt(variance))
    if not np.ptp(table.sums, axis=0).any():
        return Estimate(value, value, value)
    found = bootstrap(variances, (table.units,), seed=seed)
    noise = max(0.0, float(found.bootstrap_distribution.mean()) - variance)
    ends = np.sqrt(np.clip(np.array(found.confidence_interval) - 2 * noise, 0, None))
    return Estimate(value, min(float(ends[0]), value), max(float(ends[1]), value))


def bootstrap(
    statistic: Callable[..., Floats],
    sizes: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Any:
    """Bootstrap a statistic of weighted data (`scipy.stats.bootstrap`), with a 95 % percentile interval.

    Args:
        statistic: called with one array a factor, of shape (draws, size of it), which says how often each unit was
            drawn; returns an array whose last axis has length draws.
        sizes: the number of units of each factor; factors are resampled independently. A factor of one unit
            is held fixed, as its variation cannot be known.
        seed: seeds the draws.
        resamples: how many bootstrap samples to draw.

    Returns:
        scipy's result, with `confidence_interval` and `bootstrap_distribution`.

    Raises:
        EvaluationError: no factor has two units.
    """
    drawn = [position for position, size in enumerate(sizes) if size > 1]
    if not drawn:
        raise EvaluationError("a bootstrap needs two or more episodes of a kind; draw more")

    def of_draws(*draws: NDArray[np.intp], axis: int = -1) -> Floats:
        rows = len(draws[0])
        weights = [np.ones((rows, size)) for size in sizes]
        for position, indices in zip(drawn, draws, strict=True):
            size = sizes[position]
            places = indices + size * np.arange(rows)[:, None]
            weights[position] = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size).astype(float)
        return statistic(*weights)

    return stats.bootstrap(
        [np.arange(sizes[position]) for position in drawn],
        of_draws,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // sum(sizes)),
        vectorized=True,
        paired=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def grouped(episodes: ArrayLike, queries: int) -> NDArray[np.intp]:
    """Return which independent unit, 0 upwards, each of so many queries belongs to, shape (queries,).

    A unit is an episode, or a query where there is only one episode.

    Raises:
        EvaluationError: `episodes` is not one integer a query.
    """
    of_query = np.asarray(episodes)
    if of_query.shape != (queries,) or (queries and of_query.dtype.kind not in "iu"):
        raise EvaluationError(
            f"episodes must hold one integer for each of {queries} queries; "
            f"it has shape {of_query.shape} and type {of_query.dtype}"
        )
    found, unit = np.unique(of_query, return_inverse=True)
    return unit if len(found) > 1 else np.arange(queries)


@dataclass(frozen=True)
class _Table:
    """Values summed within units: `sums` of shape (variants, units), and the units' numbers of queries, `sizes`."""

    sums: Floats
    sizes: Floats
    mean: float
    constant: bool
    binary: bool

    @property
    def variants(self) -> int:
        return len(self.sums)

    @property
    def units(self) -> int:
        return len(self.sizes)

    @property
    def is_binary_sample(self) -> bool:
        """Whether these are independent draws of 0 or 1."""
        return self.binary and self.variants == 1 and bool((self.sizes == 1).all())

    def means(self, units: Floats, variants: Floats) -> Floats:
        """Return the mean for each row of weights; shapes (draws, units) and (draws, variants)."""
        sums = ((variants @ self.sums) * units).sum(axis=-1)
        return np.asarray(sums / (self.variants * (units @ self.sizes)))


def _table(values: ArrayLike, episodes: ArrayLike, name: str) -> _Table:
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if array.ndim != 2 or not len(array) or array.shape[1] < 2:
        raise EvaluationError(
            f"{name} must have shape (variants, queries), with two or more queries; its shape is {array.shape}"
        )
    if not np.isfinite(array).all():
        raise EvaluationError(f"{name} holds values that are not finite; bound or leave out such queries first")
    unit = grouped(episodes, array.shape[1])
    sizes = np.asarray(np.bincount(unit), dtype=np.float64)
    sums = np.array([np.bincount(unit, weights=row) for row in array], dtype=np.float64)
    constant = not np.ptp(array)
    mean = float(array.flat[0]) if constant else float(sums.sum() / (len(array) * sizes.sum()))
    return _Table(sums, sizes, mean, constant, bool(((array == 0) | (array == 1)).all()))


def _sign_flip_p(by_unit: Floats, seed: int) -> float:
    """Test that the units' differences are symmetric about 0; exact up to 12 units, from random flips above."""
    if not by_unit.any():
        return 1.0
    found = stats.permutation_test(
        (by_unit,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        batch=max(1, min(500, 2 * _BATCH_VALUES // len(by_unit))),  # larger ones are slower
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
