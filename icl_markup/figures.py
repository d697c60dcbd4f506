"""Chooses the figures of an experiment: those that there are rows for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from matplotlib.figure import Figure

from icl_markup import plots, plots_against, plots_detail
from icl_markup.report_grid import CHANCE, Grid, only, rows_of, summarise, variants_of
from icl_markup.report_rows import Row, Setting, natural

_CURVES = {"roc": "ROC curves", "risk_coverage": "risk-coverage curves"}


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Attributes:
        name: the start of its file's name.
        title: what it shows, plain text.
        caption: how to read it, plain text.
        rows: the rows that it shows.
        draw: draws it.
        folded: whether a reader has to click to see it.
    """

    name: str
    title: str
    caption: str
    rows: tuple[Row, ...]
    draw: Callable[[], Figure]
    folded: bool = False


def drawings(experiment: str, setting: Setting, rows: Sequence[Row]) -> list[Drawing]:
    """Return the figures of one experiment and setting.

    Raises:
        ConfigError: two rows measure the same thing, and differ.
    """
    place = f"{slug(experiment)}-{slug(setting.label)}"

    def title(what: str) -> str:
        return f"{experiment}: {what} ({setting.label})"

    measures, variants = summarise(row for row in rows if row.kind == "measure")
    shown, behind = only(measures, ["accuracy"]), only(variants, ["accuracy"])
    found = []
    if shown.keys() - {CHANCE}:
        text = "A dot is an accuracy, its line the 95 % interval"
        text += "; pale dots are the variants behind a mean." if behind else "."
        draw = partial(plots.accuracy, title("accuracy"), shown, behind)
        found.append(Drawing(f"{place}-accuracy", title("accuracy"), text, rows_of(shown, behind), draw))
    found += _wordings(f"{place}-wordings", title("accuracy of every variant"), shown, behind)
    found += _parameters(f"{place}-parameters", title("accuracy against trainable parameters"), shown)
    found += _spreads(f"{place}-spread", title("spread over arbitrary choices"), rows)
    for curve in sorted({row.metric for row in rows if row.kind == "curve"}, key=natural):
        name = title(_CURVES.get(curve, curve))
        of = _in_order([row for row in rows if row.kind == "curve" and row.metric == curve])
        draw = partial(plots_detail.curves, name, of)
        found.append(Drawing(f"{place}-{slug(curve)}", name, "", tuple(of), draw))
    for row in _in_order([row for row in rows if row.kind == "confusion"]):
        label = plots_detail.curve_label(row)
        name = title(f"confusions of {row.task} by {label}")
        missing = plots_detail.left_out(row)
        text = "Counts; the shade is the share of the truth's queries."
        text += f" {missing} labels with fewer errors are left out." if missing else ""
        draw = partial(plots_detail.confusion, name, row)
        file = f"{place}-confusion-{slug(row.task)}-{slug(label)}"
        found.append(Drawing(file, name, text, (row,), draw, folded=True))
    return found


def drawings_over_settings(experiment: str, settings: Mapping[Setting, Sequence[Row]]) -> list[Drawing]:
    """Return the figures that compare settings: accuracy against demonstrations a label."""
    families: dict[Setting, dict[int, Grid]] = {}
    for setting, rows in settings.items():
        shown = only(summarise(row for row in rows if row.kind == "measure")[0], ["accuracy"])
        if shown.keys() - {CHANCE} and setting.k_shot is not None:
            families.setdefault(replace(setting, k_shot=None), {})[setting.k_shot] = shown
    found = []
    for setting, by_shots in families.items():
        if len(by_shots) > 1:
            title = f"{experiment}: accuracy against demonstrations a label ({setting.label})"
            draw = partial(plots_against.shots, title, by_shots)
            text = "Lines through a point are 95 % intervals."
            name = f"{slug(experiment)}-{slug(setting.label)}-shots"
            found.append(Drawing(name, title, text, rows_of(*by_shots.values()), draw))
    return found


def _wordings(name: str, title: str, shown: Grid, behind: Grid) -> list[Drawing]:
    tasks = {row.task for row in rows_of(behind)}
    several = [label for label in shown if any(len(variants_of(behind, label, t, "accuracy")) > 1 for t in tasks)]
    if not several:
        return []
    methods = [label for label in shown if label in {*several, "tags_untrained", "tags"}]
    text = "A mark is one wording of plain prompts, or one warm-up seed of a trained method; a bar is their mean."
    rows = rows_of({label: shown[label] for label in methods}, behind)
    return [Drawing(name, title, text, rows, partial(plots.wordings, title, shown, behind, methods))]


def _parameters(name: str, title: str, shown: Grid) -> list[Drawing]:
    # A mean over variants of different sizes has no size.
    kept = {label: by_task for label, by_task in shown.items() if not label.endswith(", mean")}
    sizes = {row.data.get("trainable_parameters") or 0 for row in rows_of(kept)} - {0}
    if len(sizes) < 2:
        return []
    text = "Lines through a point are 95 % intervals; methods without trainable parameters, plain apart, are not shown."
    rows = rows_of({label: row for label, row in kept.items() if label in (CHANCE, "plain")})
    rows += tuple(row for row in rows_of(kept) if row.data.get("trainable_parameters"))
    return [Drawing(name, title, text, rows, partial(plots_against.parameters, title, kept))]


def _spreads(name: str, title: str, rows: Sequence[Row]) -> list[Drawing]:
    shown, _ = summarise(row for row in rows if row.kind == "spread")
    if not shown:
        return []
    text = "Bars are standard deviations of accuracy in percentage points, lines their 95 % intervals."
    return [Drawing(name, title, text, rows_of(shown), partial(plots_detail.spreads, title, shown))]


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return list(rows_of(*summarise(rows)))


def slug(text: str) -> str:
    """Return text as a part of a file's name: lower-case letters, digits and dashes, at most 50."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:50].rstrip("-") or "x"
