"""Rows of an open world: how well out-of-scope queries are told apart, and what a threshold from validation gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icl_markup.cells import Cell
from icl_markup.evaluation import Estimate
from icl_markup.out_of_scope import at_threshold, choose_threshold, detection_intervals, risk_coverage, roc_points
from icl_markup.statistics import interval

if TYPE_CHECKING:
    from icl_markup.measured import Measured

Row = dict[str, Any]

FEW = 10
"""Fewer episodes than this say too little about the spread over episodes."""


def open_world_rows(variants: dict[str, list[Measured]], common: Row) -> Iterator[Row]:
    """Yield detection measures of every variant, and their means where there are several.

    The threshold is chosen on validation queries alone; a method that scores every query alike has no threshold.
    Fewer than two queries in scope, or out of it, tell nothing apart, and have no rows.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for label, cells in variants.items():
        score, out = _joined(cells, "out_of_scope"), _is_out([m.cell for m in cells])
        if min(out.sum(), (~out).sum()) < 2 or np.ptp(score) == 0:
            continue
        episodes = resampled(numbered(cells))
        found[label] = detection_intervals(score, out, episodes)
        validations = [m.validation for m in cells if m.validation is not None]
        found[label] |= _thresholded(validations, cells, score, out, episodes)
    for label, measures in found.items():
        for metric, value in measures.items():
            yield _row(common, label, metric, value)
    if len(found) > 1:
        for metric in next(iter(found.values())):
            every = [measures[metric] for measures in found.values()]
            # The mean of the variants' bounds is no narrower than the interval of their mean.
            value = Estimate(*(float(np.mean([getattr(e, f) for e in every])) for f in ("mean", "low", "high")))
            values = [e.mean for e in every]
            spread = {"minimum": round(min(values), 5), "maximum": round(max(values), 5), "variants": len(every)}
            yield _row(common, "mean", metric, value, **spread)


def answered(cells: Sequence[Measured]) -> NDArray[np.bool_]:
    """Return which queries a variant answers rightly with its best option, over all seeds, (queries,)."""
    return np.concatenate([m.cell.correct[0] for m in cells])


def decided(cells: Sequence[Measured]) -> NDArray[np.bool_]:
    """Return which queries a variant answers rightly at the threshold that validation chooses, over all seeds.

    A query is rejected where its out-of-scope score lies above the threshold, else it has the best label's answer: so
    methods that can and that cannot predict "none of the above" themselves are asked the same. Where nothing chooses a
    threshold, or every query has one score, the best option is the answer.
    """
    threshold = _threshold([m.validation for m in cells if m.validation is not None])
    score = _joined(cells, "out_of_scope")
    if threshold is None or np.ptp(score) == 0:
        return answered(cells)
    inside = np.concatenate([m.cell.right_inside for m in cells])
    out = _is_out([m.cell for m in cells])
    return np.asarray(np.where(score > threshold, out, inside & ~out), dtype=np.bool_)


def _threshold(validations: Sequence[Cell]) -> float | None:
    if not validations:
        return None
    known = np.concatenate([cell.out_of_scope[0] for cell in validations])
    known_out = _is_out(validations)
    if known_out.all() or not known_out.any():
        return None
    return choose_threshold(known, np.concatenate([c.right_inside for c in validations]), known_out)


def curves(cells: Sequence[Measured], common: Row) -> Iterator[Row]:
    """Yield the ROC curve of an open world, and the risk-coverage curve, of a method's first variant.

    In an open world queries are rejected by their out-of-scope score, and answering one that is out of scope is wrong.
    """
    place = {"kind": "curve", **common, "template": cells[0].variant.config.label or cells[0].variant.label}
    if common["open_world"]:
        score, out = _joined(cells, "out_of_scope"), _is_out([m.cell for m in cells])
        if out.any() and not out.all() and np.ptp(score) > 0:
            x, y = roc_points(score, out)
            yield {**place, "curve": "roc", "x": _short(x), "y": _short(y)}
        confidence, correct = -score, np.concatenate([m.cell.right_inside for m in cells]) & ~out
    else:
        confidence, correct = _joined(cells, "confidence"), answered(cells)
    if np.ptp(confidence) > 0:
        x, y = risk_coverage(confidence, correct)
        yield {**place, "curve": "risk_coverage", "x": _short(x), "y": _short(y)}


def _thresholded(
    validations: Sequence[Cell],
    cells: Sequence[Measured],
    score: NDArray[np.float64],
    out: NDArray[np.bool_],
    episodes: NDArray[np.int64],
) -> dict[str, Estimate]:
    threshold = _threshold(validations)
    if threshold is None:
        return {}
    right = np.concatenate([m.cell.right_inside for m in cells])
    kept = at_threshold(score, right, out, threshold)
    inside = np.where(score <= threshold, right, False).astype(float)
    rejected = (score > threshold).astype(float)
    first = interval(inside[~out][None], _renumbered(episodes[~out]))
    second = interval(rejected[out][None], _renumbered(episodes[out]))
    return {
        "in_scope_accuracy": Estimate(kept.in_scope_accuracy, first.low, first.high),
        "oos_recall": Estimate(kept.oos_recall, second.low, second.high),
    }


def resampled(episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what a bootstrap resamples: episodes, or, where they are too few for that, the queries of all of them.

    The full label set is drawn a few times only; its intervals then leave out which demonstrations were drawn.
    """
    return episodes if len(np.unique(episodes)) >= FEW else np.zeros_like(episodes)


def _renumbered(episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(episodes, return_inverse=True)[1].astype(np.int64)


def _joined(cells: Sequence[Measured], name: str) -> NDArray[np.float64]:
    return np.concatenate([getattr(m.cell, name)[0] for m in cells])


def _is_out(cells: Sequence[Cell]) -> NDArray[np.bool_]:
    return np.concatenate([cell.answers[0] == cell.none for cell in cells])


def numbered(cells: Sequence[Measured]) -> NDArray[np.int64]:
    """Return the episode of each query, numbered over all seeds of a variant."""
    parts, first = [], 0
    for measured in cells:
        parts.append(measured.cell.episodes + first)
        first += int(measured.cell.episodes.max()) + 1
    return np.concatenate(parts)


def _row(common: Row, label: str, metric: str, value: Estimate, **more: Any) -> Row:
    numbers = {"value": round(value.mean, 5), "low": round(value.low, 5), "high": round(value.high, 5)}
    return {"kind": "measure", **common, "template": label, "metric": metric, **numbers, **more}


def _short(values: Sequence[float]) -> list[float]:
    return [round(float(v), 4) for v in values]
