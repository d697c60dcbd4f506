"""A picture of attention: from the slot to the parts of its prompt, and to tags, words and symbols, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from icl_markup.attention import SlotAttention
from icl_markup.plot_style import DPI, GRID, INK, LARGE, MUTED, NORMAL, SMALL, clean

_KINDS = {
    "tag": ("tags", "#D55E00", "o"),
    "text": ("the template's words", "#0072B2", "s"),
    "value": ("texts and names", "#009E73", "^"),
    "symbol": ("option symbols", "#CC79A7", "D"),
    "slot": ("the slot itself", "#E69F00", "v"),
    "special": ("special tokens, chat", "#6b6b6b", "P"),
}
_MOST_WRITTEN = 14
"""Shares are written into cells where there are no more layers than this."""


def picture(found: Sequence[SlotAttention], backbone: str) -> Figure:
    """Draw prompts of the same episode side by side.

    Above, a cell is the share of a layer's attention that goes from the slot to a part of the prompt, the mean over
    heads; the column on the left is that part's share of the prompt's tokens, which even attention would have. Below
    are the shares that go to tags, to the template's words, to texts and names, to symbols and to special tokens.
    """
    most = max(len(one.parts) for one in found)
    heights = (0.26 * most + 0.7, 2.5)
    width = 2.6 + 4.2 * len(found)
    figure = Figure(figsize=(width, sum(heights) + 0.9), dpi=DPI, layout="constrained", facecolor="white")
    title = f"Attention from the slot to the parts of a prompt, backbone {clean(backbone, 50)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE, color=INK, fontweight="bold")
    axes = figure.subplots(2, len(found), height_ratios=heights, squeeze=False)
    brightest = max(float(one.by_part.max()) for one in found)
    for place, one in enumerate(found):
        _parts(axes[0, place], one, brightest, names=place == 0 or _names(one) != _names(found[0]))
        _kinds(axes[1, place], one)
    top = max(axis.get_ylim()[1] for axis in axes[1])
    for place, axis in enumerate(axes[1]):
        axis.set_ylim(-0.02 * top, top)
        if place == 0:
            axis.set_ylabel("share of attention", fontsize=SMALL, color=INK)
    handles = {line.get_label(): line for axis in axes[1] for line in axis.get_lines()}
    figure.legend(handles.values(), [str(name) for name in handles], loc="outside lower left", ncols=6, frameon=False,
                  fontsize=SMALL, labelcolor=INK)  # fmt: skip
    return figure


def caption(found: Sequence[SlotAttention]) -> str:
    """Return what the picture shows, in words, for those who do not see it."""
    told = []
    for one in found:
        mean = one.by_part.mean(0)
        kinds = sorted({part.kind for part in one.parts}, key=lambda kind: -_share(one, kind))
        shares = ", ".join(f"{kind} {100 * _share(one, kind):.0f} %" for kind in kinds)
        best = one.parts[int(mean.argmax())]
        shares += f"; most to {clean(best.name, 40)!r}"
        told.append(f"in {one.template}, mean over {len(one.weights)} layers, {shares}")
    return f"Attention from the slot to the parts of the prompt: {'; '.join(told)}."


def _share(one: SlotAttention, kind: str) -> float:
    return float(sum(one.by_part[:, i].mean() for i, part in enumerate(one.parts) if part.kind == kind))


def _names(one: SlotAttention) -> list[str]:
    marks = {"option": "option", "demonstration": "demo"}
    return [f"{marks[p.kind]} {p.name}" if p.kind in marks else p.name for p in one.parts]


def _parts(axis: Axes, one: SlotAttention, brightest: float, names: bool) -> None:
    tokens = np.array([part.stop - part.start for part in one.parts], dtype=float)
    shares = one.by_part.T
    layers = shares.shape[1]
    # A column apart on the left: each part's share of the tokens.
    grid = np.full((len(shares), layers + 2), np.nan)
    grid[:, 0], grid[:, 2:] = tokens / tokens.sum(), shares
    axis.imshow(grid, cmap="Blues", vmin=0, vmax=brightest, aspect="auto")
    axis.set_title(clean(one.template, 40), loc="left", fontsize=NORMAL, color=INK)
    axis.spines[:].set_visible(False)
    axis.tick_params(labelsize=SMALL, colors=INK, length=0)
    axis.set_yticks(range(len(shares)), [clean(name, 44) for name in _names(one)] if names else [])
    step = 1 if layers <= _MOST_WRITTEN else -(-layers // 8)
    shown = list(range(1, layers + 1, step))
    axis.set_xticks([0, *(layer + 1 for layer in shown)], ["tokens", *map(str, shown)])
    axis.set_xlabel("layer; cells: % of its attention (left: % of the tokens)", fontsize=SMALL, color=INK)
    written = range(layers + 2) if layers <= _MOST_WRITTEN else [0]
    for row in range(len(grid)):
        for column in written:
            value = grid[row, column]
            if not np.isnan(value):
                ink = "white" if value > 0.6 * brightest else INK
                text = f"{100 * value:.0f}" if value >= 0.005 or value == 0 else "<1"
                written_share = axis.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)
                written_share.set_in_layout(False)  # it lies within its cell, and measuring it takes time


def _kinds(axis: Axes, one: SlotAttention) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(labelsize=SMALL, colors=INK, length=2, color=MUTED)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    layers = range(1, len(one.weights) + 1)
    every = 1 if len(layers) <= _MOST_WRITTEN else len(layers) // 8
    for kind, share in sorted(one.by_kind.items(), key=lambda item: list(_KINDS).index(item[0])):
        name, colour, marker = _KINDS[kind]
        axis.plot(layers, share, f"{marker}-", color=colour, markersize=4.5, linewidth=1.4, markevery=every, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_xlabel("layer", fontsize=SMALL, color=INK)
