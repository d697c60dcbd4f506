"""Reads rows of results for a report: checks them, and sorts them into settings, methods and variants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_markup.errors import ConfigError, nearest

MEAN, BEST = "mean", "best on validation"
"""Templates of rows that stand for several variants of a method."""

TRAINING_LOSS = "training loss"
"""The metric of rows that have `first` and `last` in place of `value`, and no setting."""

_NUMBERS = {
    "measure": ("value",),
    "comparison": ("difference", "p_value", "p_adjusted"),
    "spread": ("value",),
    "curve": (),
    "confusion": (),
}
_METRIC = {"measure": "metric", "comparison": "against", "spread": "over", "curve": "curve", "confusion": ""}


@dataclass(frozen=True)
class Setting:
    """What rows of one table have in common.

    Attributes:
        n_way: options an episode; None: every label.
        k_shot: demonstrations a label; None where the row does not say.
        retrieval: how options and demonstrations were retrieved, in words; None: they were not.
        open_world: whether "none of the above" is an option.
        vary: what every episode was varied in, such as "demo order"; None: nothing.
        backbone: the language model, where an experiment measured the same thing on several.
    """

    n_way: int | None
    k_shot: int | None
    retrieval: str | None
    open_world: bool
    vary: str | None = None
    backbone: str | None = None

    @property
    def label(self) -> str:
        """The setting in words."""
        parts = ["all labels" if self.n_way is None else f"{self.n_way} options"]
        if self.k_shot is not None:
            count = "no demonstrations" if self.k_shot == 0 else f"{self.k_shot} demonstrations a label"
            parts.append("1 demonstration a label" if self.k_shot == 1 else count)
        if self.retrieval is not None:
            parts.append(f"retrieval: {self.retrieval}")
        if self.open_world:
            parts.append("open world")
        if self.vary is not None:
            parts.append(f"{self.vary} varied")
        return ", ".join(parts if self.backbone is None else [*parts, self.backbone])

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts settings: fewer options and demonstrations first, all labels last."""
        many = math.inf
        return (
            self.backbone or "",
            self.open_world,
            many if self.n_way is None else self.n_way,
            natural(self.retrieval or ""),
            many if self.k_shot is None else self.k_shot,
            natural(self.vary or ""),
        )


@dataclass(frozen=True)
class Row:
    """One row of results.

    Attributes:
        source: the file and line that it was read from, as ``file:line``.
        kind: measure, comparison, spread, curve or confusion; "training loss" for a measure of that.
        metric: what was measured: the metric of a measure, what a comparison is against, what a spread is over,
            which curve; empty for a confusion.
        data: the row's keys and values; accuracies, intervals and spreads lie between 0 and 1.
    """

    source: str
    kind: str
    metric: str
    data: Mapping[str, Any]

    @property
    def experiment(self) -> str:
        """The experiment's name."""
        return str(self.data["experiment"])

    @property
    def task(self) -> str:
        """The task's name; "all tasks" where the row names none."""
        return str(self.data.get("task") or "all tasks")

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.data["method"])

    @property
    def variant(self) -> str:
        """The wording, warm-up run or other variant."""
        return str(self.data.get("template") or "none")

    @property
    def value(self) -> float:
        """The value of a measure or spread, the difference of a comparison."""
        return float(self.data["difference" if self.kind == "comparison" else "value"])

    @property
    def result(self) -> dict[str, Any]:
        """What was found: the row without what it was measured with."""
        return {key: value for key, value in self.data.items() if key not in ("commit", "versions", "hardware")}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The bounds of the 95 % interval; None where the row has none."""
        low, high = self.data.get("low"), self.data.get("high")
        return None if low is None or high is None else (float(low), float(high))

    @property
    def setting(self) -> Setting:
        """The row's setting, without its backbone; a spread names itself what was varied."""
        of = self.data.get
        vary = None if self.kind == "spread" else of("vary")
        return Setting(of("n_way"), of("k_shot"), of("retrieval"), bool(of("open_world")), vary)


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Read files of rows; a row that stands there twice, word for word, is read once.

    Raises:
        ConfigError: a file cannot be read; a line is no row, or of an unknown kind (the message names file and line).
    """
    rows: dict[str, Row] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as rows of results ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                data = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{source}: not valid JSON ({error}); remove the line") from error
            rows.setdefault(json.dumps(data, sort_keys=True), parse_row(data, source))
    return list(rows.values())


def parse_row(data: Any, source: str) -> Row:
    """Check one row; a row without a kind is a measure of accuracy or of the training loss, as older rows are.

    Args:
        data: the row, as read from JSON.
        source: the file and line, for messages.

    Raises:
        ConfigError: a key is missing or of the wrong type, or the kind is unknown.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a row must be a JSON object, not {type(data).__name__}; remove the line")
    data = dict(data)
    kind = data.setdefault("kind", "measure")
    if not isinstance(kind, str) or kind not in _NUMBERS:
        hint = nearest(str(kind), _NUMBERS)
        raise ConfigError(f"{source}: unknown kind {kind!r}{hint}; the kinds are {', '.join(_NUMBERS)}")
    if kind == "measure":
        data.setdefault("metric", "accuracy" if "accuracy" in data else None)
        if "value" not in data and data["metric"] == "accuracy":
            data["value"] = data.get("accuracy")
    for key in filter(None, ("experiment", "method", "command", _METRIC[kind])):
        if not isinstance(data.get(key), str):
            raise ConfigError(f"{source}: {key} must be text, not {data.get(key)!r}")
    for key, types in (("n_way", int), ("k_shot", int), ("retrieval", str), ("vary", str), ("open_world", bool)):
        if data.get(key) is not None and (type(data[key]) is not types):
            raise ConfigError(f"{source}: {key} must be {types.__name__} or null, not {data[key]!r}")
    _check_content(data, kind, source)
    metric = data[_METRIC[kind]] if _METRIC[kind] else ""
    return Row(source, TRAINING_LOSS if metric == TRAINING_LOSS and kind == "measure" else kind, metric, data)


def _check_content(data: dict[str, Any], kind: str, source: str) -> None:
    metric = data.get("metric")
    needed = ("first", "last") if kind == "measure" and metric == TRAINING_LOSS else _NUMBERS[kind]
    optional = [key for key in ("low", "high", "minimum", "maximum") if data.get(key) is not None]
    for key in (*needed, *optional):
        # A method may rule the right option out: its log loss is then infinite, and that is its value.
        if not _is_number(data.get(key), infinite=metric == "log_loss"):
            raise ConfigError(f"{source}: {key} must be a finite number, not {data.get(key)!r}")
    if kind == "curve":
        x, y = data.get("x"), data.get("y")
        if not (isinstance(x, list) and isinstance(y, list) and x and len(x) == len(y) and _are_numbers([*x, *y])):
            raise ConfigError(f"{source}: x and y must be lists of finite numbers, as many in one as in the other")
    if kind == "confusion":
        labels, counts = data.get("labels"), data.get("counts")
        size = len(labels) if isinstance(labels, list) and all(isinstance(one, str) for one in labels) else 0
        if not (size and isinstance(counts, list) and len(counts) == size):
            raise ConfigError(f"{source}: labels must be a list of texts, and counts have a list for each of them")
        if not all(isinstance(line, list) and len(line) == size and _are_numbers(line) for line in counts):
            raise ConfigError(f"{source}: counts must be square: {size} numbers for each of the {size} labels")


def _is_number(value: Any, infinite: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (math.isfinite(value) or (infinite and value == math.inf))


def _are_numbers(values: list[Any]) -> bool:
    return all(_is_number(value) for value in values)


def natural(text: str) -> tuple[Any, ...]:
    """Sort text with the numbers in it as numbers: "width 4" before "width 10"."""
    parts = re.split(r"([0-9]{1,18})", text.casefold())
    return tuple((int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)), text
