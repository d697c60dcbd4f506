"""Figures of accuracy against something: demonstrations a label, trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from icl_markup.plot_style import (
    CHANCE_DASHES,
    DPI,
    GRID,
    INK,
    MUTED,
    SMALL,
    clean,
    looks,
    lowest,
    note,
    panels,
    percent_limits,
    shares,
    spread_out,
)
from icl_markup.plots import accuracy_of, chance_line, extent
from icl_markup.report_grid import CHANCE, Grid, tasks_of
from icl_markup.report_rows import Row, natural

Box = tuple[float, float, float, float]
# Places around a point: so many steps up, to the right of it or not, the nearest first.
_AROUND = [(move, side) for move in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6) for side in (True, False)]


def shots(title: str, by_shots: Mapping[int, Grid]) -> Figure:
    """Draw a panel for each task: accuracy against demonstrations a label, a line for each method, named at its end.

    Args:
        title: the figure's title.
        by_shots: accuracies by method, for each number of demonstrations.
    """
    counts = sorted(by_shots)
    last = len(counts) - 1
    edge = last + 0.16 + 0.06 * last
    labels = list(dict.fromkeys(label for grid in by_shots.values() for label in grid if label != CHANCE))
    tasks = sorted({task for grid in by_shots.values() for task in tasks_of(grid)}, key=natural)
    height = max(2.5, 0.14 * len(labels) + 0.9)
    figure, axes = panels(title, [clean(task) for task in tasks], (4.4, height), 2, 0.2)
    values: list[float] = []
    ends = []
    for axis, task in zip(axes, tasks, strict=True):
        axis.grid(axis="y", color=GRID, linewidth=0.6)
        ends.append(_lines(axis, [by_shots[count] for count in counts], labels, task, values))
        guess = [(k, row) for k, count in enumerate(counts) if (row := accuracy_of(by_shots[count], CHANCE, task))]
        if guess:
            height_of = [100 * row.value for _, row in guess]
            axis.plot([k for k, _ in guess], height_of, color=MUTED, linestyle=CHANCE_DASHES, linewidth=1)
            note(axis, CHANCE, (guess[0][0], height_of[0]), MUTED)
            values += height_of
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.tick_params(labelbottom=True)
        shares(axis, "y")
    low, high = percent_limits(values)
    axes[0].set_xlim(-0.4, edge)
    axes[0].set_ylim(low, high)
    gap = (high - low) * (SMALL + 1.5) / 72 / (height - 0.6)
    style = looks(labels)
    for axis, names in zip(axes, ends, strict=True):
        places = spread_out([y for _, y, _ in names], gap, low, high)
        for (x, y, label), place in zip(names, places, strict=True):
            colour = style[label].colour
            axis.plot([x, edge], [y, place], color=colour, linewidth=0.5, alpha=0.6)
            note(axis, clean(label, 34), (edge, place), colour, offset=(3, 0), align=("left", "center"))
    for axis in lowest(axes, 2):
        axis.set_xlabel("demonstrations a label", fontsize=SMALL, color=INK)
    return figure


def _lines(
    axis: Axes, grids: Sequence[Grid], labels: Sequence[str], task: str, values: list[float]
) -> list[tuple[float, float, str]]:
    """Draw a line for each method; add what they span to `values`, and return where each ends."""
    style = looks(labels)
    ends = []
    for number, label in enumerate(labels):
        found = [(k, row) for k, grid in enumerate(grids) if (row := accuracy_of(grid, label, task)) is not None]
        if not found:
            continue
        # Neighbours stand a little apart, so that no interval hides another.
        shift = 0.012 * (len(grids) - 1) * (number - (len(labels) - 1) / 2)
        x = [k + shift for k, _ in found]
        y = [100 * row.value for _, row in found]
        of = style[label]
        axis.plot(x, y, color=of.colour, linestyle=of.dashes, marker=of.marker, markersize=4, linewidth=1.3)
        for place, (_, row) in zip(x, found, strict=True):
            span = extent(row)
            axis.plot([place, place], [min(span), max(span)], color=of.colour, linewidth=0.8, alpha=0.6)
            values += span
        ends.append((x[-1], y[-1], label))
    return ends


def parameters(title: str, shown: Grid) -> Figure:
    """Draw a panel for each task: accuracy against trainable parameters (on a logarithmic axis), each method named.

    Args:
        title: the figure's title.
        shown: accuracies by method. Plain prompts and chance, which have no parameters, become horizontal lines;
            other methods without parameters are left out.
    """
    sized = {
        label: {key: row for key, row in by_task.items() if _size(row)}
        for label, by_task in shown.items()
        if any(_size(row) for row in by_task.values())
    }
    tasks, style = tasks_of(sized), looks(list(shown))
    figure, axes = panels(title, [clean(task) for task in tasks], (4.4, 3.0), 2, 0.2)
    values: list[float] = []
    sizes: list[int] = []
    for axis, task in zip(axes, tasks, strict=True):
        axis.grid(axis="both", color=GRID, linewidth=0.6)
        for label in sized:
            row = accuracy_of(sized, label, task)
            if row is not None:
                of, span, size = style[label], extent(row), _size(row)
                axis.plot([size, size], [min(span), max(span)], color=of.colour, linewidth=1.2, alpha=0.7)
                axis.plot([size], [span[0]], of.marker, color=of.colour, markersize=5.5)
                values += span
                sizes.append(size)
        values += chance_line(axis, shown, task, vertical=False)
        plain = accuracy_of(shown, "plain", task)
        if plain is not None:
            height, colour = 100 * plain.value, style["plain"].colour
            axis.axhline(height, color=colour, linewidth=1)
            where = ("axes fraction", "data")
            align = ("right", "baseline")
            note(axis, "plain, 0 parameters", (1, height), colour, offset=(0, 2), coordinates=where, align=align)
            values.append(height)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelbottom=True)
        shares(axis, "y")
    axes[0].set_xlim(min(sizes) / 4, max(sizes) * 4)
    axes[0].set_ylim(*percent_limits(values, 0.1))
    for axis in lowest(axes, 2):
        axis.set_xlabel("trainable parameters", fontsize=SMALL, color=INK)
    # Names go where there is room for them, which is known once the panels have their places.
    figure.draw_without_rendering()
    for axis, task in zip(axes, tasks, strict=True):
        found = {label: row for label in sized if (row := accuracy_of(sized, label, task)) is not None}
        heights = [
            100 * row.value for label in (CHANCE, "plain") if (row := accuracy_of(shown, label, task)) is not None
        ]
        _name_points(axis, {label: (float(_size(row)), 100 * row.value) for label, row in found.items()}, heights)
    return figure


def _name_points(axis: Axes, points: Mapping[str, tuple[float, float]], lines: Sequence[float]) -> None:
    """Write names beside points, each at the first place that neither a point, a name nor a line's height takes."""
    style, scale = looks(list(points)), DPI / 72
    height = (SMALL + 1) * scale
    pixels: dict[str, tuple[float, float]] = {}
    for label, point in points.items():
        x, y = axis.transData.transform(point)
        pixels[label] = float(x), float(y)
    panel = axis.get_window_extent()
    taken: list[Box] = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in pixels.values()]
    for value in lines:
        y = float(axis.transData.transform((1.0, value))[1])
        taken.append((panel.x0, y - 2 * scale, panel.x1, y + 2 * scale))
        taken.append((panel.x1 - 20 * 0.6 * SMALL * scale, y, panel.x1, y + 1.2 * height))
    for label, (left, bottom) in sorted(pixels.items(), key=lambda item: item[1]):
        text = clean(label, 34)
        width = 0.6 * SMALL * len(text) * scale
        for move, to_right in _AROUND:
            x0 = left + 7 * scale if to_right else left - 7 * scale - width
            y0 = bottom + 0.8 * move * height - height / 2
            box = (x0, y0, x0 + width, y0 + height)
            inside = x0 >= panel.x0 and box[2] <= panel.x1 and y0 >= panel.y0 and box[3] <= panel.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            box, move, to_right = (left, bottom, left, bottom), 0, True
        taken.append(box)
        offset = (7.0 if to_right else -7.0, 0.8 * move * height / scale)
        align = ("left" if to_right else "right", "center")
        if abs(move) > 1:
            arrow = {"arrowstyle": "-", "color": style[label].colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axis.annotate("", points[label], offset, textcoords="offset points", arrowprops=arrow)
        note(axis, text, points[label], style[label].colour, offset=offset, align=align, in_layout=False)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _size(row: Row) -> int:
    return int(row.data.get("trainable_parameters") or 0)


def _count(value: float) -> str:
    for unit, name in ((1e9, " billion"), (1e6, " million"), (1e3, ",000")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
