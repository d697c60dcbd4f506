"""Rows over all tasks of a setting: of each calibration, and of the one that suits a method best on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_markup.cells import Cell
from icl_markup.experiment_config import ExperimentConfig
from icl_markup.measured import Group, Measured
from icl_markup.open_world import answered
from icl_markup.statistics import compare, interval
from icl_markup.summary import Row, common_of, measure_row

Selected = dict[str, list[Cell]]
"""Cells on the selection tasks, by the identity of what was measured there."""

CHOSEN = " + calibration chosen on validation"


@dataclass(frozen=True)
class _Side:
    """What has a row: some variants of a method.

    Attributes:
        method: what rows call it.
        label: what tells it from other rows of the method.
        cells: of each variant the cells of all tasks.
        chosen: what validation chose.
    """

    method: str
    label: str
    cells: dict[str, list[Measured]]
    chosen: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        """The same as a group of one task, which counts units and makes what all rows share."""
        first = next(iter(self.cells.values()))[0]
        return Group(self.method, first.variant.config.label, first.task, first.setting, self.cells)

    @property
    def correct(self) -> NDArray[np.float64]:
        """Which queries each variant answered rightly, (variants, queries)."""
        return np.array([answered(cells) for cells in self.cells.values()], dtype=np.float64)


def pooled_rows(
    measured: Sequence[Measured], selected: Selected, config: ExperimentConfig, command: str
) -> list[dict[str, Any]]:
    """Return accuracies over all tasks of one setting, and the reference's differences to other methods.

    Tasks count by their queries. Each calibration has rows of its own. A method that was measured with several has
    further rows, with the calibration of the highest mean accuracy over the selection tasks; these are compared. Of
    wordings there are the mean, and the one that is best on the selection tasks.

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
    methods: dict[tuple[str, str | None], dict[str, dict[str, list[Measured]]]] = {}
    for one in measured:
        if one.variant.method != "chance":
            calibrations = methods.setdefault((one.variant.base, one.variant.config.label), {})
            cells = calibrations.setdefault(one.variant.config.calibration, {})
            cells.setdefault(one.variant.label, []).append(one)
    rows: list[Row] = []
    compared: dict[tuple[str, str | None], list[_Side]] = {}
    for key, calibrations in methods.items():
        every, compared[key] = _sides(key[0], calibrations, selected)
        for side in every:
            rows.append(_accuracy(side, _common(side, len(tasks), config, command)))
    references = compared.get((config.reference, None), [])
    for side in [side for sides in compared.values() for side in sides if references]:
        if side is not references[0] and side.correct.shape[1] == references[0].correct.shape[1]:
            rows.append(_comparison(references[0], side, _common(side, len(tasks), config, command)))
    return rows


def _sides(
    base: str, calibrations: dict[str, dict[str, list[Measured]]], selected: Selected
) -> tuple[list[_Side], list[_Side]]:
    """Return what has rows, and what of that is compared: the calibration that validation chooses, if there are any."""

    def validated(cells: Sequence[Measured]) -> float:
        found = selected.get(cells[0].variant.identity)
        return float(np.mean([cell.correct.mean() for cell in found])) if found else float("nan")

    accuracy = {name: {label: validated(of) for label, of in cells.items()} for name, cells in calibrations.items()}
    means = {name: float(np.mean([*of.values()])) for name, of in accuracy.items()}
    every: list[_Side] = []
    for cells in calibrations.values():
        first = next(iter(cells.values()))[0].variant
        every.append(_Side(first.method, _label(cells), cells))
    final = list(every)
    is_known = all(np.isfinite(mean) for mean in means.values())
    if len(calibrations) > 1:
        if not is_known:
            return every, []
        best = max(means, key=means.__getitem__)
        final = [_Side(base + CHOSEN, _label(calibrations[best]), calibrations[best], {"calibration": best})]
        every += final
    config = next(iter(final[0].cells.values()))[0].variant.config
    if config.name == "plain" and is_known and len(final[0].cells) > 1:
        at = max(((name, label) for name, of in accuracy.items() for label in of), key=lambda x: accuracy[x[0]][x[1]])
        chosen = {"wording": at[1], **({"calibration": at[0]} if len(calibrations) > 1 else {})}
        final.append(_Side(final[0].method, "best on validation", {at[1]: calibrations[at[0]][at[1]]}, chosen))
        every.append(final[-1])
    return every, final


def _label(cells: dict[str, list[Measured]]) -> str:
    """Return what rows call the variants of a method together: their mean, or the only one."""
    group = next(iter(cells.values()))[0].variant.config.label
    name = "mean" if len(cells) > 1 else next(iter(cells))
    return name if group is None else group if len(cells) == 1 else f"{group}, {name}"


def _common(side: _Side, tasks: int, config: ExperimentConfig, command: str) -> Row:
    return {**common_of(side.group, config, command), "task": f"all {tasks} tasks", "pooled": True, **side.chosen}


def _accuracy(side: _Side, common: Row) -> Row:
    correct = side.correct
    means = correct.mean(axis=1)
    more = {"minimum": means.min(), "maximum": means.max()} if len(means) > 1 else {}
    rounded = {key: round(float(value), 5) for key, value in more.items()}
    variants = {"variants": len(means)} if len(means) > 1 else {}
    return measure_row(common, side.label, "accuracy", interval(correct, side.group.units), **rounded, **variants)


def _comparison(reference: _Side, side: _Side, common: Row) -> Row:
    found = compare(reference.correct, side.correct, side.group.units)
    return {
        "kind": "comparison",
        **common,
        "template": reference.label,
        "method": reference.method,
        "against": f"{side.method} ({side.label})",
        "difference": round(found.difference, 5),
        "low": round(found.low, 5),
        "high": round(found.high, 5),
        "p_value": round(found.p_value, 6),
        "test": found.test,
    }
