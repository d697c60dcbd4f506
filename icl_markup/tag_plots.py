"""A picture of tags: where they lie among the vocabulary, how long they are, and how alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from icl_markup.plot_style import DPI, GRID, INK, LARGE, MUTED, NORMAL, SMALL, clean, spread_out
from icl_markup.tag_geometry import MOST_FITTED, Floats, Plane, main_plane, sample, similarities
from icl_markup.tag_report import Folders, row_names

# Okabe & Ito's palette without its yellow, which is too light on white, one colour a folder.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_MOST_ROWS = 40
"""A matrix of more rows cannot be read."""


def picture(found: Folders) -> Figure:
    """Draw tags in four panels; a colour is a folder, a marker a tag.

    Two panels show tags and vocabulary (grey, the darker the more tokens) in the plane of the vocabulary's first two
    principal components, and in that of the tags' own; axes say how much of the variance of what they were fitted to
    lies along them. One shows the norms of both, and one the similarity of tags: cosines after the vocabulary's mean
    is subtracted, soft token by soft token for one folder, and of each tag's mean for several.
    """
    air = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1, hspace=0.04, wspace=0.03)
    figure = Figure(figsize=(11.4, 10.6), dpi=DPI, layout=air, facecolor="white")
    backbone = clean(str(found.files[0].backbone["name"]), 60)
    figure.suptitle(f"Tags among the vocabulary of {backbone}", x=0.01, ha="left", fontsize=LARGE, color=INK,
                    fontweight="bold")  # fmt: skip
    axes = figure.subplots(2, 2)
    vocabulary = sample(found.table, MOST_FITTED)
    rows = torch.cat([rows for vectors in found.vectors for rows in vectors.values()])
    for axis, title, fitted in zip(axes[0], ("the vocabulary's", "the tags'"), (vocabulary, rows), strict=True):
        _plane(axis, found, vocabulary, main_plane(fitted), f"{title} main directions")
    _norms(axes[1, 0], found)
    _matrix(figure, axes[1, 1], found)
    _legend(figure, found)
    return figure


def caption(found: Folders) -> str:
    """Return what the picture shows, in words, for those who do not see it."""
    tags = _tags(found)
    which = f"{len(found.files)} warm-ups" if len(found.files) > 1 else "one warm-up"
    return (
        f"The tags {', '.join(tags)} of {which} among {len(found.table):,} tokens of the vocabulary: in the plane of "
        "the vocabulary's first two principal components, in that of the tags' own, by norm, and by similarity."
    )


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=NORMAL, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(labelsize=SMALL, colors=INK, length=2, color=MUTED)


def _plane(axis: Axes, found: Folders, vocabulary: torch.Tensor, plane: Plane, title: str) -> None:
    _style(axis, title)
    cloud = plane(vocabulary)
    points = [{name: plane(rows) for name, rows in vectors.items()} for vectors in found.vectors]
    everything = np.concatenate([cloud, *(at for of in points for at in of.values())])
    low, high = everything.min(0), everything.max(0)
    air = 0.04 * (high - low)
    # Leave room on the right for names.
    axis.set_xlim(low[0] - air[0], high[0] + 0.3 * (high[0] - low[0]))
    axis.set_ylim(low[1] - air[1], high[1] + air[1])
    extent = (low[0], high[0], low[1], high[1])
    axis.hexbin(cloud[:, 0], cloud[:, 1], gridsize=45, extent=extent, bins="log", mincnt=1, cmap="Greys", vmin=0.5,
                vmax=len(cloud) / 8, linewidths=0.2, zorder=1)  # fmt: skip
    markers = _markers(found)
    for of, colour in zip(points, _colours(found), strict=True):
        for name, at in of.items():
            axis.plot(at[:, 0], at[:, 1], markers[name], color=colour, markersize=6.5, mec="white", mew=0.7, zorder=4)
    _names(axis, points, high[0] + 0.06 * (high[0] - low[0]))
    for which, share in zip("xy", plane.explained, strict=True):
        label = f"principal component {'12'['xy'.index(which)]} ({100 * share:.0f} % of the variance)"
        axis.set(**{f"{which}label": label})
        getattr(axis, f"{which}axis").label.set(fontsize=SMALL, color=INK)


def _names(axis: Axes, points: Sequence[dict[str, Floats]], x: float) -> None:
    """Write each tag's name at the right, in the order of the heights of its points' means, and lead lines there."""
    names = list(dict.fromkeys(name for of in points for name in of))
    centres = np.array([np.mean([of[name].mean(0) for of in points if name in of], axis=0) for name in names])
    low, high = axis.get_ylim()
    gap = 0.05 * (high - low)
    heights = spread_out(centres[:, 1].tolist(), gap, low + gap, high - gap)
    for name, centre, height in zip(names, centres, heights, strict=True):
        axis.plot([centre[0], x], [centre[1], height], "-", color=MUTED, linewidth=0.6, zorder=3)
        axis.annotate(clean(name, 18), (x, height), (3, 0), textcoords="offset points", va="center", fontsize=SMALL,
                      color=INK)  # fmt: skip


def _norms(axis: Axes, found: Folders) -> None:
    _style(axis, "norms of soft tokens, and of the vocabulary's tokens (grey)")
    norms = found.table.norm(dim=1).numpy()
    own = [{name: rows.norm(dim=1).numpy() for name, rows in vectors.items()} for vectors in found.vectors]
    names = list(dict.fromkeys(name for of in own for name in of))
    everything = np.concatenate([norms, *(values for of in own for values in of.values())])
    bins = np.linspace(0, everything.max() * 1.02, 61).tolist()
    counts, _, _ = axis.hist(norms, bins=bins, color="#c9c9c9")
    top = float(np.max(counts))
    axis.set_ylim(-0.11 * top * len(names) - 0.06 * top, 1.05 * top)
    axis.axhline(0, color=MUTED, linewidth=0.8)
    markers = _markers(found)
    for line, name in enumerate(names):
        height = -0.11 * top * (line + 0.75)
        axis.axhline(height, color=GRID, linewidth=0.6, zorder=0)
        for of, colour in zip(own, _colours(found), strict=True):
            values = of.get(name, np.empty(0))
            axis.plot(values, [height] * len(values), markers[name], color=colour, markersize=6, mec="white", mew=0.7)
    ticks = [tick for tick in axis.get_yticks() if 0 <= tick <= top]
    lanes = [-0.11 * top * (line + 0.75) for line in range(len(names))]
    axis.set_yticks([*ticks, *lanes], [*(f"{tick:,.0f}" for tick in ticks), *(clean(name, 18) for name in names)])
    axis.set_xlim(0, bins[-1])
    axis.set_xlabel("Euclidean norm", fontsize=SMALL, color=INK)
    told = "tokens of the vocabulary a bar"
    axis.text(0.015, 0.975, told, transform=axis.transAxes, va="top", fontsize=SMALL, color=INK)


def _matrix(figure: Figure, axis: Axes, found: Folders) -> None:
    if len(found.files) == 1:
        [vectors] = found.vectors
        rows, names = torch.cat(list(vectors.values())), row_names(vectors)
        title = "similarity of soft tokens"
    else:
        folders = list(zip(found.names, found.vectors, strict=True))
        both = [(f"{clean(tag, 18)} {clean(n, 14)}", of[tag]) for tag in _tags(found) for n, of in folders if tag in of]
        rows, names = torch.stack([of.mean(0) for _, of in both]), [name for name, _ in both]
        title = "similarity of tags (the mean of a tag's soft tokens)"
    rows, names = rows[:_MOST_ROWS], names[:_MOST_ROWS]
    _style(axis, title)
    axis.spines[["left", "bottom"]].set_visible(False)
    values = similarities(rows, rows, found.mean).numpy()
    image: Any = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    places = range(len(names))
    small = SMALL if len(names) <= 24 else 6.0
    axis.set_yticks(places, [clean(name, 34) for name in names], fontsize=small)
    axis.set_xticks(places, [clean(name, 34) for name in names], fontsize=small, rotation=90)
    if len(names) <= 16:
        for i in places:
            for j in places:
                ink = "white" if abs(values[i, j]) > 0.65 else INK
                size = SMALL if len(names) <= 10 else 6.0
                number = f"{values[i, j]:.2f}".replace("-", "−")
                shown = axis.text(j, i, number, ha="center", va="center", fontsize=size, color=ink)
                shown.set_in_layout(False)  # it lies within the matrix, and measuring it takes time
    bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
    bar.set_label("cosine, the vocabulary's mean subtracted", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2, color=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _markers(found: Folders) -> dict[str, str]:
    return {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(_tags(found))}


def _tags(found: Folders) -> list[str]:
    return list(dict.fromkeys(name for vectors in found.vectors for name in vectors))


def _colours(found: Folders) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(found.files))]


def _legend(figure: Figure, found: Folders) -> None:
    handles = [
        Line2D([], [], color=INK, marker=marker, linestyle="", label=clean(name, 24))
        for name, marker in _markers(found).items()
    ]
    if len(found.files) > 1:
        handles += [
            Line2D([], [], color=colour, marker="s", markersize=8, linestyle="", label=clean(name, 40))
            for name, colour in zip(found.names, _colours(found), strict=True)
        ]
    figure.legend(handles=handles, loc="outside lower left", ncols=8, frameon=False, fontsize=SMALL, labelcolor=INK)
