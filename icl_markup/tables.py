"""Tables of a report: rows of one experiment and setting as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icl_markup.markdown import escape, table
from icl_markup.report_grid import CHANCE, Grid, only, rows_of, summarise, tasks_of
from icl_markup.report_rows import TRAINING_LOSS, Row, natural

OUT_OF_SCOPE = {
    "in_scope_accuracy": "in-scope accuracy",
    "oos_recall": "out-of-scope recall",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr_at_95_tpr": "FPR at 95 % TPR",
}
CALIBRATION = {"log_loss": "log loss, nats", "expected_calibration_error": "expected calibration error, %"}
SPREADS = ("wording", "demo order", "option order", "drawn demos", "warm-up seed")
_PERCENT = {"accuracy", "expected_calibration_error", "right option offered, %", *OUT_OF_SCOPE}
# Beyond these many columns a table of tasks is turned on its side, so that it fits a page.
_WIDEST = 8


@dataclass(frozen=True)
class Block:
    """A part of a page: a table, and the rows that it shows.

    Attributes:
        title: its heading, plain text.
        body: the table, Markdown.
        rows: the rows that its numbers come from.
        note: how to read it, Markdown; may be empty.
        folded: whether a reader has to click to see it.
    """

    title: str
    body: str
    rows: tuple[Row, ...]
    note: str = ""
    folded: bool = False


def tables(rows: Sequence[Row]) -> list[Block]:
    """Return the tables of one experiment and setting: those that there are rows for.

    Raises:
        ConfigError: two rows measure the same thing, and differ.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    shown, behind = summarise(kinds.get("measure", []))
    made = (
        _accuracy(shown),
        _variants(behind),
        _comparisons(summarise(kinds.get("comparison", []))),
        _measures("None of the above", shown, OUT_OF_SCOPE, "All in %; positive: no option fits."),
        _measures("Probabilities", shown, CALIBRATION, ""),
        _others(shown),
        _spreads(summarise(kinds.get("spread", []))),
    )
    return [block for block in made if block is not None]


def number(value: float, metric: str = "accuracy") -> str:
    """Return a value as tables show it: shares in percent, others as they are."""
    if metric in _PERCENT:
        return f"{100 * value:.1f}"
    return "∞" if value == math.inf else f"{value:.3f}" if metric == "log_loss" else f"{value:.4g}"


def with_interval(row: Row) -> str:
    """Return ``value (low–high)``, with ``[minimum–maximum]`` where the row is a mean over variants.

    Chance is known, and so stands without an interval.
    """
    text = number(row.value, row.metric)
    if row.interval is not None and row.method != CHANCE:
        text += f" ({number(row.interval[0], row.metric)}–{number(row.interval[1], row.metric)})"
    minimum, maximum = row.data.get("minimum"), row.data.get("maximum")
    if minimum is not None and maximum is not None:
        text += f" [{number(minimum, row.metric)}–{number(maximum, row.metric)}]"
    return text


def points(value: float, *, sign: bool = True) -> str:
    """Return a difference or standard deviation of accuracies in percentage points."""
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return text.replace("-", "−")


def _accuracy(shown: Grid) -> Block | None:
    cells = only(shown, ["accuracy"])
    if not cells:
        return None
    tasks = tasks_of(cells)
    lines = []
    asked_less: set[str] = set()
    for task in tasks:
        found = [by_task.get((task, "accuracy")) for by_task in cells.values()]
        most = max((_queries(row) for row in found if row is not None), default=0)
        # What was asked a part of the queries is shown, but not ranked.
        partial = [row is not None and 0 < _queries(row) < most for row in found]
        best = _best([None if row is None or part else row.value for row, part in zip(found, partial, strict=True)])
        texts = [
            "" if row is None else _bold(with_interval(row), place in best) + f" on {_queries(row)} queries" * part
            for place, (row, part) in enumerate(zip(found, partial, strict=True))
        ]
        asked_less |= {label for label, part in zip(cells, partial, strict=True) if part}
        lines.append([escape(task), *texts])
    if len(tasks) > 1:
        # Means over different tasks cannot be compared: only methods that were measured on all of them have one.
        values = [[by_task[task, "accuracy"].value for task in tasks if (task, "accuracy") in by_task]
                  if label not in asked_less else [] for label, by_task in cells.items()]  # fmt: skip
        means = [sum(of) / len(tasks) if len(of) == len(tasks) else None for of in values]
        best = _best(means)
        texts = ["" if mean is None else _bold(number(mean), place in best) for place, mean in enumerate(means)]
        lines.append(["mean over tasks", *texts])
    grid = [["task", *map(escape, cells)], *lines]
    if len(cells) > max(_WIDEST, len(tasks)):
        grid = [list(column) for column in zip(*grid, strict=True)]
        grid[0][0] = "method"
    rows = rows_of(cells)
    return Block("Accuracy", table(grid[0], grid[1:]), rows, _accuracy_note(rows))


def _queries(row: Row) -> int:
    return int(row.data.get("queries") or 0) if row.method != CHANCE else 0


def _accuracy_note(rows: Sequence[Row]) -> str:
    note = "In %, with 95 % interval; **bold**: the best of a task."
    if any(row.data.get("open_world") for row in rows):
        note += (
            " Queries are rejected at a threshold of the out-of-scope score that validation chose; a method without "
            "such a score, or a task without such queries in validation, has the largest score's answer."
        )
    fewer = {
        row.task: row.data["mean_options"]
        for row in rows
        if row.data.get("n_way") and (row.data.get("mean_options") or math.inf) < row.data["n_way"]
    }
    if fewer:
        note += " Fewer options, as the task has no more: "
        note += ", ".join(f"{escape(task)} {count:g}" for task, count in fewer.items()) + "."
    cut = sum(int(row.data.get("dropped") or 0) for row in rows)
    if cut:
        note += f" In {cut} cases a demonstration did not fit a prompt and was left out."
    counts = {(row.method, row.data["variants"]): None for row in rows if row.data.get("variants") is not None}
    if counts:
        over = ", ".join(f"{escape(method)} over {count}" for method, count in counts)
        note += f" Means over variants, with [lowest–highest]: {over}."
    chosen = {(row.method, str(row.data["wording"])): None for row in rows if row.data.get("wording") is not None}
    if chosen:
        names = ", ".join(f"{escape(method)}: {escape(wording)}" for method, wording in chosen)
        note += f" Best on validation: {names}."
    return note


def _variants(behind: Grid) -> Block | None:
    tasks, rows = tasks_of(behind), rows_of(behind)
    lines = []
    for label, by_task in behind.items():
        for metric in dict.fromkeys(metric for _, metric in by_task):
            found = [by_task.get((task, metric)) for task in tasks]
            cells = ["" if row is None else with_interval(row) for row in found]
            lines.append([escape(label), _metric_name(metric), *cells])
    title = "Every variant behind the means"
    return (
        Block(title, table(["variant", "measure", *map(escape, tasks)], lines, 2), rows, folded=True) if rows else None
    )


def _comparisons(summary: tuple[Grid, Grid]) -> Block | None:
    lines, rows = [], []
    for task, label, row in _by_task(summary):
        difference = points(row.value)
        if row.interval is not None:
            difference += f" ({points(row.interval[0])} to {points(row.interval[1])})"
        adjusted = _p_value(row.data["p_adjusted"])
        adjusted = f"**{adjusted}**" if row.data["p_adjusted"] < 0.05 else adjusted
        test = escape(str(row.data.get("test") or ""))
        versus = f"{escape(label)} − {escape(row.metric)}"
        lines.append([escape(task), versus, difference, _p_value(row.data["p_value"]), adjusted, test])
        rows.append(row)
    if not rows:
        return None
    headings = ["task", "comparison", "difference, points", "p", "p, Holm-adjusted", "test"]
    note = (
        "Differences in percentage points of accuracy, with 95 % interval; **bold**: adjusted p below 0.05. The family "
        "of the adjustment is all comparisons of this setting. They speak of these test sets: small ones are asked "
        "again in many episodes."
    )
    return Block("Comparisons", table(headings, lines, 2), tuple(rows), note)


def _measures(title: str, shown: Grid, metrics: dict[str, str], note: str) -> Block | None:
    cells = only(shown, list(metrics))
    columns = [metric for metric in metrics if any(metric == of for by_task in cells.values() for _, of in by_task)]
    lines = []
    for task in tasks_of(cells):
        for label, by_task in cells.items():
            found = [by_task.get((task, metric)) for metric in columns]
            if any(found):
                lines.append(
                    [escape(task), escape(label), *("" if row is None else with_interval(row) for row in found)]
                )
    headings = ["task", "method", *(metrics[metric] for metric in columns)]
    return Block(title, table(headings, lines, 2), rows_of(cells), note) if lines else None


def _others(shown: Grid) -> Block | None:
    """What a row may measure beyond the known metrics, as it is."""
    known = {"accuracy", *OUT_OF_SCOPE, *CALIBRATION}
    metrics = sorted({metric for by_task in shown.values() for _, metric in by_task} - known, key=natural)
    return _measures("Other measurements", shown, {metric: escape(metric) for metric in metrics}, "")


def training_loss(rows: Sequence[Row]) -> Block | None:
    """Return the table of an experiment's training losses; None where it has none."""
    rows = [row for row in rows if row.kind == TRAINING_LOSS]
    lines = [
        [
            *(escape(str(row.data.get(key) or "")) for key in ("task", "backbone", "method", "template", "steps")),
            f"{row.data['first']:.2f}",
            f"{row.data['last']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (natural(row.task), natural(json.dumps(row.data, sort_keys=True))))
    ]
    headings = ["task", "backbone", "method", "template", "steps", "at first", "at last"]
    return Block("Training loss", table(headings, lines, 4), tuple(rows)) if lines else None


def _spreads(summary: tuple[Grid, Grid]) -> Block | None:
    shown, _ = summary
    found = {(row.task, row.metric) for row in rows_of(shown)}
    lines = []
    for task, over in sorted(found, key=lambda pair: (natural(pair[0]), spread_order(pair[1]))):
        cells = []
        for by_task in shown.values():
            row = by_task.get((task, over))
            text = "" if row is None else points(row.value, sign=False)
            if row is not None and row.interval is not None:
                text += f" ({points(row.interval[0], sign=False)}–{points(row.interval[1], sign=False)})"
            cells.append(text)
        lines.append([escape(task), escape(over), *cells])
    note = (
        "Standard deviation in percentage points, with 95 % interval. Over wordings and warm-up seeds: of the accuracy "
        "over all queries. Over orders and drawn demonstrations: of the accuracy of one episode's few queries, on "
        "average over episodes, which is a larger scale."
    )
    headings = ["task", "spread over", *map(escape, shown)]
    return Block("Spread", table(headings, lines, 2), rows_of(shown), note) if lines else None


def spread_order(over: str) -> tuple[Any, ...]:
    """Sort what a spread is over: the known choices first."""
    return (SPREADS.index(over) if over in SPREADS else len(SPREADS), natural(over))


def _by_task(summary: tuple[Grid, Grid]) -> list[tuple[str, str, Row]]:
    """Return (task, label, row) of what is shown and what is behind it, by task."""
    found = [(row.task, label, row) for part in summary for label, cells in part.items() for row in cells.values()]
    return sorted(found, key=lambda item: natural(item[0]))


def _metric_name(metric: str) -> str:
    known = {"accuracy": "accuracy, %", **{m: f"{name}, %" for m, name in OUT_OF_SCOPE.items()}, **CALIBRATION}
    return known.get(metric, escape(metric))


def _best(values: Sequence[float | None]) -> set[int]:
    """Return the places of the best values; those that look equal in the table are equally good."""
    seen = [(place, round(100 * value, 1)) for place, value in enumerate(values) if value is not None]
    top = max((value for _, value in seen), default=0.0)
    return {place for place, value in seen if value == top} if len(seen) > 1 else set()


def _bold(text: str, bold: bool) -> str:
    value, space, rest = text.partition(" ")
    return f"**{value}**{space}{rest}" if bold else text


def _p_value(value: float) -> str:
    return "&lt; 0.0001" if value < 0.0001 else f"{value:.4f}"
