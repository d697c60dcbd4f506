"""How figures look: colours that colour-blind readers can tell apart, panels with shared axes, text as it is."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from PIL import Image

from icl_markup.markdown import one_line
from icl_markup.report_grid import base_method

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
SMALL, NORMAL, LARGE = 8.0, 9.0, 11.0
"""Font sizes in points."""

DPI = 110

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/), one colour a family of methods; markers and dashes tell
# the members of a family apart. Its yellow is too light for lines on white.
_FAMILIES = {
    "plain": "#0072B2",
    "tags": "#D55E00",
    "tags_untrained": "#E69F00",
    "prompt_tuning": "#CC79A7",
    "lora": "#CC79A7",
    "full_finetuning": "#CC79A7",
    "embedding_knn": "#009E73",
    "embedding_centroid": "#009E73",
    "embedding_logreg": "#009E73",
    "tfidf_logreg": "#56B4E9",
    "setfit": "#56B4E9",
    "retrieval": "#009E73",
    "majority": "#8c8c8c",
    "label_names": "#8c8c8c",
    "chance": "#8c8c8c",
}
CHANCE_DASHES: Any = (0, (4, 3))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one method."""

    colour: str
    marker: str
    dashes: Any


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """Return how to draw methods, by their labels in tables (``method``, ``method: variant`` …)."""
    members: dict[str, int] = {}
    found = {}
    for label in labels:
        colour = _FAMILIES.get(base_method(label), "#000000")
        place = members.get(colour, 0)
        members[colour] = place + 1
        found[label] = Look(colour, _MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)])
    return found


def panels(
    title: str,
    names: Sequence[str],
    size: tuple[float, float],
    columns: int,
    margin: float = 0.0,
    share: tuple[bool, bool] = (True, True),
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each name.

    Args:
        title: the figure's title.
        names: the panels' titles; no title is drawn over the panel of an empty name.
        size: width and height of one panel, inches.
        columns: the most panels side by side.
        margin: inches to the left, for the labels of the vertical axis.
        share: whether panels share their horizontal and their vertical axis.
    """
    columns = min(columns, len(names))
    lines = math.ceil(len(names) / columns)
    width = margin + columns * size[0]
    title = textwrap.fill(clean(title, 160), max(30, int(width * 11)))
    height = lines * size[1] + 0.25 * (title.count("\n") + 1) + 0.25
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE, color=INK, fontweight="bold")
    grid = figure.subplots(lines, columns, sharex=share[0], sharey=share[1], squeeze=False)
    axes = list(grid.flat)
    for unused in axes[len(names) :]:
        unused.remove()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(shorten(name, int(size[0] * 11)), loc="left", fontsize=NORMAL, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(labelsize=SMALL, colors=INK, length=2, color=MUTED)
    for place in range(len(names) - columns, len(names)):
        # The lowest panel of a column is not always in the lowest line.
        axes[place].tick_params(labelbottom=True)
    return figure, axes[: len(names)]


def note(
    axis: Axes,
    text: str,
    at: tuple[float, float],
    colour: str,
    *,
    offset: tuple[float, float] = (3.0, 2.0),
    coordinates: Any = "data",
    align: tuple[str, str] = ("left", "baseline"),
    in_layout: bool = True,
) -> None:
    """Write text beside a point, `offset` points away from it; it may stand outside of the panel."""
    axis.annotate(
        text,
        at,
        offset,
        xycoords=coordinates,
        textcoords="offset points",
        ha=align[0],
        va=align[1],
        fontsize=SMALL,
        color=colour,
        annotation_clip=False,
        in_layout=in_layout,
    )


def legend(figure: Figure, labels: Sequence[str], drawn: Literal["lines", "markers", "areas"]) -> None:
    """Name methods below the panels, each in its colour, with its dashes, its marker or a square of its colour."""
    lines = drawn == "lines"
    handles = [
        Line2D(
            [],
            [],
            color=of.colour,
            marker={"lines": "", "markers": of.marker, "areas": "s"}[drawn],
            linestyle=of.dashes if lines else "",
        )
        for of in looks(labels).values()
    ]
    names = [clean(label, 40) for label in labels]
    columns = max(1, int(figure.get_size_inches()[0] * 11 / (max(map(len, names)) + 7)))
    figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        handlelength=2.4 if lines else 1.0,
        labelcolor=INK,
    )


def lowest(axes: Sequence[Axes], columns: int) -> list[Axes]:
    """Return the panels that have none below them, for their labels."""
    return list(axes[-min(columns, len(axes)) :])


def percent_limits(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Return limits in percent that hold all values (percent) with some air, within 0 to 100 and a little beyond."""
    low, high = min(values), max(values)
    air = max(2.0, margin * (high - low))
    return max(low - air, -1.5), min(high + air, 101.5)


def shares(axis: Axes, which: str) -> None:
    """Label an axis (``x`` or ``y``) in percent."""
    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near the wanted ones, in order of them, at least `gap` apart and within bounds if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [wanted[index] for index in order]
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    for index in range(len(places)):
        floor = low if index == 0 else places[index - 1] + gap
        places[index] = max(places[index], floor)
    for index in reversed(range(len(places))):
        ceiling = high if index == len(places) - 1 else places[index + 1] - gap
        places[index] = min(places[index], ceiling)
    found = [0.0] * len(places)
    for place, index in zip(places, order, strict=True):
        found[index] = place
    return found


def clean(text: str, limit: int = 48) -> str:
    """Return text on one line, shortened in its middle, with a box for each character that the font lacks."""
    known = _characters()
    return shorten("".join(one if ord(one) in known else "□" for one in one_line(text)), limit)


def shorten(text: str, limit: int) -> str:
    """Return text of at most `limit` characters: what is too much is taken out of its middle."""
    keep = max(limit - 1, 2)
    return text if len(text) <= limit else f"{text[: keep - keep // 3]}…{text[-(keep // 3) :]}"


@cache
def _characters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans"))
    return frozenset(font_manager.get_font(path).get_charmap())


def to_png(figure: Figure, *, few_colours: bool = True) -> bytes:
    """Return the figure as a PNG, the same bytes for the same figure; dollar signs stay as they are.

    Args:
        figure: the figure.
        few_colours: keep 256 of its colours: enough for lines and areas, too few for shades.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_fontfamily("DejaVu Sans")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = BytesIO()
    # 256 colours make a third of the bytes, and less than SVG; of PIL's methods this one keeps every line's own colour.
    if few_colours:
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
