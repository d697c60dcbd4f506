"""Arranges rows of results for tables and figures: by setting, then by method, with the variants behind a mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from icl_markup.errors import ConfigError
from icl_markup.report_rows import BEST, MEAN, Row, Setting, natural

Grid = dict[str, dict[tuple[str, str], Row]]
"""Rows by method (as it is labelled in a table), and by (task, metric)."""

CHANCE = "chance"

# What may tell two rows of one variant apart, in words.
_TELLING = {"seed": "episode seed {}", "episodes": "{} episodes"}
_METHODS = (
    "chance",
    "majority",
    "label_names",
    "plain",
    "tags_untrained",
    "tags",
    "prompt_tuning",
    "lora",
    "full_finetuning",
    "embedding_knn",
    "embedding_centroid",
    "embedding_logreg",
    "tfidf_logreg",
    "setfit",
    "retrieval",
)


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Sort an experiment's rows by setting; by backbone too where the same thing was measured on several.

    A method without a backbone retrieves nothing: its rows stand beside those of prompts in every setting that is the
    same but for backbone and retrieval.
    """
    seen: dict[tuple[Any, ...], Any] = {}
    several = False
    for row in rows:
        key = (row.kind, row.metric, row.task, row.method, row.variant, row.setting, row.data.get("seed"))
        several |= seen.setdefault(key, row.data.get("backbone")) != row.data.get("backbone")

    def is_free(row: Row) -> bool:
        return row.data.get("backbone") is None and row.setting.retrieval is None

    def place(row: Row) -> Setting:
        return replace(row.setting, backbone=str(row.data.get("backbone") or "no backbone") if several else None)

    found: dict[Setting, list[Row]] = {}
    for row in rows:
        if not is_free(row):
            found.setdefault(place(row), [])
    prompted = list(found)
    for row in rows:
        hosts = [one for one in prompted if is_free(row) and replace(one, retrieval=None, backbone=None) == row.setting]
        for setting in hosts or [place(row)]:
            found.setdefault(setting, []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def summarise(rows: Iterable[Row]) -> tuple[Grid, Grid]:
    """Sort one setting's rows of one kind into what a table shows and the variants behind its means.

    A method with one variant goes under its name, and so does the mean over its variants; "best on validation" stands
    beside it. Variants without a mean each stand by themselves, as ``method: variant``. So do those that are no
    arbitrary choice to take a mean over: the variants of an ablation, and those of different trainable parameters.

    Returns:
        What to show, and the variants behind a mean, both in the order of methods.

    Raises:
        ConfigError: two rows measure the same thing, and differ.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (method_order(row.method), method_order(row.metric), _variant_order(row))):
        groups.setdefault((row.method, row.metric), []).append(row)
    shown: Grid = {}
    behind: Grid = {}
    for (method, metric), group in groups.items():
        suffixes = _suffixes(group)
        plain = [row for row in group if row.variant not in (MEAN, BEST)]
        ablated = group[0].experiment == "ablation" and base_method(method) != "plain"
        alone = ablated or len({row.data.get("trainable_parameters") for row in plain}) > 1
        averaged = any(row.variant == MEAN for row in group) and not alone
        single = len({row.variant + suffixes[row.variant, row.source] for row in plain}) == 1
        for row in group:
            suffix = suffixes[row.variant, row.source]
            if row.variant == MEAN and not (alone and plain):
                label, grid = method + suffix, shown
            elif row.variant in (MEAN, BEST):
                label, grid = f"{method}, {row.variant}{suffix}", shown
            elif single and not averaged:
                label, grid = method, shown
            else:
                label = f"{method}: {row.variant}{suffix}".replace(": none, ", ": ")
                grid = behind if averaged else shown
            other = grid.setdefault(label, {}).setdefault((row.task, metric), row)
            if other is not row and other.result != row.result:
                raise ConfigError(
                    f"{row.source}: has the same task, method, template and setting as {other.source}, and another "
                    "result; remove the one that is out of date"
                )
    return shown, behind


def _suffixes(group: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Return what to add to a variant's name, by (variant, source): what tells it from its repetitions, if any."""
    repeated: dict[tuple[str, str], list[Row]] = {}
    for row in group:
        repeated.setdefault((row.task, row.variant), []).append(row)
    telling: dict[str, list[str]] = {}
    for (_, variant), rows in repeated.items():
        keys = [key for key in _TELLING if len({row.data.get(key) for row in rows}) > 1]
        telling.setdefault(variant, []).extend(keys)
    found = {}
    for row in group:
        parts = [_TELLING[key].format(row.data.get(key)) for key in _TELLING if key in telling[row.variant]]
        found[row.variant, row.source] = "".join(f", {part}" for part in parts)
    return found


def _variant_order(row: Row) -> tuple[Any, ...]:
    rank = {MEAN: 0, BEST: 1}.get(row.variant, 2)
    telling = tuple(natural(str(row.data.get(key))) for key in _TELLING)
    return (rank, natural(row.variant), telling, natural(row.task), json.dumps(row.data, sort_keys=True))


def method_order(method: str) -> tuple[Any, ...]:
    """Sort methods: simple ones first, and a calibrated one after the method that it calibrates."""
    base = base_method(method)
    known = _METHODS.index(base) if base in _METHODS else len(_METHODS)
    return (known, natural(base), method != base, natural(method))


def base_method(label: str) -> str:
    """Return the method in a label, without calibration, way of detection or variant."""
    return re.split(r" \+ | \(|: |, ", label, maxsplit=1)[0]


def tasks_of(cells: Grid) -> list[str]:
    """Return the tasks of cells, in order."""
    return sorted({task for by_task in cells.values() for task, _ in by_task}, key=natural)


def only(grid: Grid, metrics: Iterable[str]) -> Grid:
    """Return the grid with these metrics alone, without methods that have none of them."""
    metrics = set(metrics)
    kept = {label: {key: row for key, row in by_task.items() if key[1] in metrics} for label, by_task in grid.items()}
    return {label: by_task for label, by_task in kept.items() if by_task}


def rows_of(*grids: Grid) -> tuple[Row, ...]:
    """Return the rows of grids."""
    return tuple(row for grid in grids for by_task in grid.values() for row in by_task.values())


def variants_of(behind: Grid, label: str, task: str, metric: str) -> list[Row]:
    """Return the variants behind the mean that a label stands for."""
    found = [by_task[task, metric] for by_task in behind.values() if (task, metric) in by_task]
    return [row for row in found if row.method == label]
