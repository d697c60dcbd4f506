"""Rows over all tasks of a setting together, each method with the calibration that suits it best on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_markup.cells import Cell
from icl_markup.experiment_config import ExperimentConfig
from icl_markup.measured import Group, Measured
from icl_markup.open_world import answered, numbered
from icl_markup.statistics import compare, interval
from icl_markup.summary import Row, common_of, measure_row
from icl_markup.variants import Variant

Selected = dict[str, list[Cell]]
"""Cells on the selection tasks, by the identity of what was measured there."""


@dataclass(frozen=True)
class _Side:
    """What is compared: some variants of a method, with one calibration."""

    label: str
    calibration: str
    variants: dict[str, list[Measured]]
    """Cells by variant, of all tasks."""

    @property
    def correct(self) -> NDArray[np.float64]:
        """Which queries each variant answered rightly, (variants, queries)."""
        return np.array([answered(cells) for cells in self.variants.values()], dtype=np.float64)


def pooled_rows(
    measured: Sequence[Measured], selected: Selected, config: ExperimentConfig, command: str
) -> list[dict[str, Any]]:
    """Return accuracies over all tasks of one setting, and the reference's differences to other methods.

    Tasks count by their queries. Where a method was measured with several calibrations, that with the highest mean
    accuracy on the selection tasks stands for it. Of wordings there is the mean and the one that is best there.

    Args:
        measured: every cell of the setting.
        selected: the cells of the selection tasks.
        config: the experiment.
        command: the command that makes the rows again.

    Returns:
        Nothing where there is one task, an open world, or orders that vary.
    """
    tasks = list(dict.fromkeys(one.task.name for one in measured))
    if len(tasks) < 2 or measured[0].setting.open_world or measured[0].setting.vary != "nothing":
        return []
    rows: list[Row] = []
    sides: list[tuple[Row, _Side]] = []
    methods: dict[tuple[str, str | None], list[Measured]] = {}
    for one in measured:
        if one.variant.method != "chance":
            methods.setdefault((one.variant.base, one.variant.config.label), []).append(one)
    for mine in methods.values():
        for side in _sides(mine, selected):
            common = _common(side, f"all {len(tasks)} tasks", config, command)
            accuracy = side.correct
            more = {"minimum": accuracy.mean(1).min(), "maximum": accuracy.mean(1).max()} if len(accuracy) > 1 else {}
            rounded = {key: round(float(value), 5) for key, value in more.items()}
            value = interval(accuracy, _units(side))
            rows.append(measure_row(common, side.label, "accuracy", value, calibration=side.calibration, **rounded))
            sides.append((common, side))
    reference = next((side for _, side in sides if _method(side) == (config.reference, None)), None)
    if reference is None:
        return rows
    for common, side in sides:
        if side is reference or side.correct.shape[1] != reference.correct.shape[1]:
            continue
        found = compare(reference.correct, side.correct, _units(side))
        rows.append(
            {
                "kind": "comparison",
                **common,
                "template": reference.label,
                "method": config.reference,
                "calibration": reference.calibration,
                "against": f"{' '.join(filter(None, _method(side)))} ({side.label}, calibration {side.calibration})",
                "difference": round(found.difference, 5),
                "low": round(found.low, 5),
                "high": round(found.high, 5),
                "p_value": round(found.p_value, 6),
                "test": found.test,
            }
        )
    return rows


def _sides(measured: Sequence[Measured], selected: Selected) -> list[_Side]:
    """Return a method's mean over variants, and the best wording, with the calibrations that validation chooses."""
    by_calibration: dict[str, dict[str, list[Measured]]] = {}
    for one in measured:
        cells = by_calibration.setdefault(one.variant.config.calibration, {})
        cells.setdefault(one.variant.label, []).append(one)

    def validated(variant: Variant) -> float:
        cells = selected.get(variant.identity)
        return float(np.mean([cell.correct.mean() for cell in cells])) if cells else float("nan")

    accuracy = {
        calibration: {label: validated(cells[0].variant) for label, cells in variants.items()}
        for calibration, variants in by_calibration.items()
    }
    means = {calibration: float(np.mean([*of.values()])) for calibration, of in accuracy.items()}
    chosen = next(iter(means))
    if len(means) > 1:
        if not all(np.isfinite(value) for value in means.values()):
            return []
        chosen = max(means, key=means.__getitem__)
    variants = by_calibration[chosen]
    sides = [_Side("mean" if len(variants) > 1 else next(iter(variants)), chosen, variants)]
    if measured[0].variant.config.name == "plain" and len(variants) > 1 and np.isfinite(means[chosen]):
        best = {calibration: max(of, key=of.__getitem__) for calibration, of in accuracy.items()}
        calibration = max(best, key=lambda one: accuracy[one][best[one]])
        wording = best[calibration]
        sides.append(_Side("best on validation", calibration, {wording: by_calibration[calibration][wording]}))
    return sides


def _common(side: _Side, tasks: str, config: ExperimentConfig, command: str) -> Row:
    """Return what rows of a side share."""
    first = _first(side)
    group = Group(first.variant.base, first.variant.config.label, first.task, first.setting, side.variants)
    wording = {"wording": next(iter(side.variants))} if side.label == "best on validation" else {}
    return {**common_of(group, config, command), "task": tasks, **wording}


def _method(side: _Side) -> tuple[str, str | None]:
    variant = _first(side).variant
    return variant.base, variant.config.label


def _first(side: _Side) -> Measured:
    return next(iter(side.variants.values()))[0]


def _units(side: _Side) -> NDArray[np.int64]:
    """Return the episode of each query, numbered over all tasks and seeds."""
    return numbered(next(iter(side.variants.values())))
