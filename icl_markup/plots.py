"""Figures of accuracy: by task and method, over wordings, against shots and against trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
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
    percent_limits,
    shares,
)
from icl_markup.report_grid import CHANCE, Grid, tasks_of, variants_of
from icl_markup.report_rows import Row

_KEY = "accuracy"


def accuracy(title: str, shown: Grid, behind: Grid) -> Figure:
    """Draw a panel for each task: a dot with its 95 % interval for each method, its variants as pale dots behind.

    Args:
        title: the figure's title.
        shown: accuracies by method; chance becomes a dashed line.
        behind: the variants of methods that are shown as a mean.
    """
    labels, tasks = [label for label in shown if label != CHANCE], tasks_of(shown)
    columns = len(tasks) if len(tasks) <= 4 else 3
    margin = 0.3 + 0.068 * min(48, max(len(label) for label in labels))
    figure, axes = panels(title, [clean(t) for t in tasks], (2.3, 0.55 + 0.2 * len(labels)), columns, margin)
    style = looks(labels)
    values: list[float] = []
    for axis, task in zip(axes, tasks, strict=True):
        axis.set_axisbelow(True)
        axis.grid(axis="both", color=GRID, linewidth=0.6)
        for place, label in enumerate(labels):
            row = shown[label].get((task, _KEY))
            if row is None:
                continue
            pale = [100 * one.value for one in variants_of(behind, label, task, _KEY)]
            axis.plot(pale, [place] * len(pale), "o", color=style[label].colour, markersize=4, alpha=0.3, mew=0)
            _dot(axis, row, place, style[label].colour)
            values += [*pale, *extent(row)]
        values += chance_line(axis, shown, task, vertical=True)
    axes[0].set_yticks(range(len(labels)), [clean(label) for label in labels])
    axes[0].set_ylim(len(labels) - 0.2, -0.7)
    axes[0].set_xlim(*percent_limits(values))
    for axis in lowest(axes, columns):
        shares(axis, "x")
        axis.set_xlabel("accuracy, 95 % interval", fontsize=SMALL, color=INK)
    return figure


def wordings(title: str, shown: Grid, behind: Grid, methods: Sequence[str]) -> Figure:
    """Draw a group of lines for each task: every wording (or warm-up seed) of a method as a dot, its mean as a bar.

    Args:
        title: the figure's title.
        shown: accuracies by method.
        behind: the variants behind means.
        methods: the methods to draw, in order.
    """
    tasks = tasks_of({label: shown[label] for label in methods})
    style = looks(methods)
    height = len(tasks) * (0.16 * len(methods) + 0.14) + 0.5
    margin = 0.3 + 0.068 * min(48, max(map(len, tasks)))
    figure, [axis] = panels(title, [""], (5.6, height), 1, margin)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    values: list[float] = []
    step = 1 / (len(methods) + 1)
    for group, task in enumerate(tasks):
        if group:
            axis.axhline(group - 0.5, color=GRID, linewidth=0.6)
        for lane, label in enumerate(methods):
            height = group + (lane - (len(methods) - 1) / 2) * step
            row = shown[label].get((task, _KEY))
            ours = [100 * one.value for one in variants_of(behind, label, task, _KEY)]
            if row is not None:
                mean = 100 * row.value
                if len(ours) > 1:
                    axis.plot([mean] * 2, [height - 0.35 * step, height + 0.35 * step], "-", color=INK, linewidth=1.8)
                else:
                    ours = ours or [mean]
                values.append(mean)
            of = style[label]
            axis.plot(ours, [height] * len(ours), of.marker, color=of.colour, markersize=5.5, alpha=0.75, mew=0)
            values += ours
        guess = accuracy_of(shown, CHANCE, task)
        if guess is not None:
            value = 100 * guess.value
            axis.plot([value, value], [group - 0.4, group + 0.4], color=MUTED, linestyle=CHANCE_DASHES, linewidth=1)
            note(axis, CHANCE if group == 0 else "", (value, group - 0.4), MUTED, offset=(3, -8))
            values.append(value)
    axis.set_yticks(range(len(tasks)), [clean(task) for task in tasks])
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.set_xlim(*percent_limits(values))
    shares(axis, "x")
    axis.set_xlabel("accuracy of each variant; the bar is their mean", fontsize=SMALL, color=INK)
    legend(figure, methods, "markers")
    return figure


def _dot(axis: Axes, row: Row, place: float, colour: str) -> None:
    low, high = (100 * bound for bound in row.interval or (row.value, row.value))
    axis.plot([low, high], [place, place], "-", color=colour, linewidth=1.4)
    axis.plot([100 * row.value], [place], "o", color=colour, markersize=4.8, mew=0)


def chance_line(axis: Axes, shown: Grid, task: str, *, vertical: bool) -> list[float]:
    """Draw chance as a dashed line and name it; return its value in percent, if there is one."""
    row = accuracy_of(shown, CHANCE, task)
    if row is None:
        return []
    value = 100 * row.value
    if vertical:
        axis.axvline(value, color=MUTED, linestyle=CHANCE_DASHES, linewidth=1)
        note(axis, CHANCE, (value, 0), MUTED, coordinates=("data", "axes fraction"))
    else:
        axis.axhline(value, color=MUTED, linestyle=CHANCE_DASHES, linewidth=1)
        note(axis, CHANCE, (0, value), MUTED, coordinates=("axes fraction", "data"))
    return [value]


def accuracy_of(grid: Grid, label: str, task: str) -> Row | None:
    """Return the accuracy of a method on a task; None where it was not measured."""
    return grid.get(label, {}).get((task, _KEY))


def extent(row: Row) -> list[float]:
    """Return a row's value and the bounds of its interval, in percent."""
    return [100 * value for value in (row.value, *(row.interval or ()))]
