"""Figures of one thing in detail: ROC and risk-coverage curves, a task's confusions, spread over arbitrary choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from icl_markup.plot_style import (
    CHANCE_DASHES,
    GRID,
    INK,
    MUTED,
    SMALL,
    clean,
    legend,
    looks,
    lowest,
    note,
    panels,
    shares,
)
from icl_markup.report_grid import Grid, tasks_of
from icl_markup.report_rows import Row, natural
from icl_markup.tables import spread_order

MOST_LABELS = 60
"""Labels of a confusion matrix that can still be read."""


def curve_label(row: Row) -> str:
    """Return the name of a curve or confusion, which is of one variant of a method."""
    return row.method if row.variant in ("none", "mean") else f"{row.method}: {row.variant}"


def curves(title: str, rows: Sequence[Row]) -> Figure:
    """Draw a panel for each task with a curve for each method.

    Args:
        title: the figure's title.
        rows: curve rows of one kind, ``roc`` or ``risk_coverage``.
    """
    tasks = sorted({row.task for row in rows}, key=natural)
    labels = list(dict.fromkeys(curve_label(row) for row in rows))
    style = looks(labels)
    is_roc = rows[0].metric == "roc"
    figure, axes = panels(title, [clean(task) for task in tasks], (3.0, 3.0 if is_roc else 2.4), 3, 0.3)
    for axis, task in zip(axes, tasks, strict=True):
        axis.grid(color=GRID, linewidth=0.6)
        if is_roc:
            axis.plot([0, 100], [0, 100], color=MUTED, linestyle=CHANCE_DASHES, linewidth=1)
            note(axis, "chance", (60, 55), MUTED)
        for row in rows:
            if row.task == task:
                of = style[curve_label(row)]
                x, y = (100 * np.asarray(row.data[name], dtype=np.float64) for name in ("x", "y"))
                axis.plot(x, y, color=of.colour, linestyle=of.dashes, linewidth=1.5)
        axis.set_xlim(0, 100)
        axis.set_xticks(range(0, 101, 25))
        if is_roc:
            axis.set_aspect("equal")
            axis.set_yticks(range(0, 101, 25))
        shares(axis, "x")
        shares(axis, "y")
    axes[0].set_ylim(0, 100 if is_roc else None)
    for axis in lowest(axes, 3):
        axis.set_xlabel("false positives" if is_roc else "coverage: queries answered", fontsize=SMALL, color=INK)
    for axis in axes[::3]:
        axis.set_ylabel("true positives" if is_roc else "errors among them", fontsize=SMALL, color=INK)
    legend(figure, labels, "lines")
    return figure


def confusion(title: str, row: Row) -> Figure:
    """Draw a confusion matrix: counts in the cells, shade by share of the truth's queries.

    Of more than `MOST_LABELS` labels those with the most errors are drawn; `left_out` says how many are not.
    """
    counts = np.asarray(row.data["counts"], dtype=np.float64)
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    kept = np.sort(np.argsort(-errors, kind="stable")[:MOST_LABELS])
    part = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = [clean(row.data["labels"][place], 30) for place in kept]
    size = 0.36 if len(labels) <= 20 else 0.22
    font = SMALL if len(labels) <= 20 else SMALL - 2
    names = 0.072 * max(map(len, labels)) + 0.4
    side = size * len(labels) + names
    figure, [axis] = panels(title, [""], (max(side, 3.2), side), 1)
    axis.imshow(part[np.ix_(kept, kept)], cmap=colormaps["Blues"], vmin=0, vmax=1)
    for i, truth in enumerate(kept):
        for j, guess in enumerate(kept):
            if counts[truth, guess]:
                colour = "white" if part[truth, guess] > 0.55 else INK
                axis.text(j, i, f"{counts[truth, guess]:g}", ha="center", va="center", fontsize=font, color=colour)
    axis.set_xticks(range(len(labels)), labels, rotation=90)
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(length=0)
    axis.set_anchor("N")
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("answer", fontsize=SMALL, color=INK)
    axis.set_ylabel("truth", fontsize=SMALL, color=INK)
    return figure


def left_out(row: Row) -> int:
    """Return how many labels of a confusion matrix are too many to draw."""
    return max(0, len(row.data["labels"]) - MOST_LABELS)


def spreads(title: str, shown: Grid) -> Figure:
    """Draw a panel for each task: a bar with its interval for each method and arbitrary choice.

    Args:
        title: the figure's title.
        shown: spread rows by method, and by (task, what the spread is over).
    """
    tasks = tasks_of(shown)
    choices = sorted({over for by_task in shown.values() for _, over in by_task}, key=spread_order)
    style = looks(list(shown))
    height = 0.17 * len(shown) * len(choices) + 0.12 * len(choices) + 0.6
    figure, axes = panels(title, [clean(task) for task in tasks], (2.7, height), 3, 1.1)
    thick = 0.8 / len(shown)
    highest = 0.0
    for axis, task in zip(axes, tasks, strict=True):
        axis.grid(axis="x", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        for lane, (label, by_task) in enumerate(shown.items()):
            for place, over in enumerate(choices):
                row = by_task.get((task, over))
                if row is None:
                    continue
                middle = place + (lane - (len(shown) - 1) / 2) * thick
                axis.barh(middle, 100 * row.value, 0.9 * thick, color=style[label].colour)
                low, high = (100 * bound for bound in row.interval or (row.value, row.value))
                axis.plot([low, high], [middle, middle], color=INK, linewidth=1)
                highest = max(highest, high, 100 * row.value)
    axes[0].set_yticks(range(len(choices)), [clean(over) for over in choices])
    axes[0].set_ylim(len(choices) - 0.45, -0.55)
    axes[0].set_xlim(0, 1.06 * highest or 1.0)
    for axis in lowest(axes, 3):
        axis.set_xlabel("standard deviation, points of accuracy", fontsize=SMALL, color=INK)
    legend(figure, list(shown), "areas")
    return figure
