"""Prints rows of results as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_rows(rows: Sequence[dict[str, Any]], experiment: str) -> None:
    """Print an experiment's rows: a line for a task and setting, a column for a method (its mean, where it has one)."""
    rows = [row for row in rows if row["experiment"] == experiment]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title=f"{experiment}: accuracy, % (95 % interval)")
    for heading in ("task", "N", "K", *methods):
        table.add_column(heading)
    for task, n_way, k_shot in dict.fromkeys((r["task"], r["n_way"], r["k_shot"]) for r in rows):
        cells = []
        for method in methods:
            of = [r for r in rows if (r["task"], r["n_way"], r["k_shot"], r["method"]) == (task, n_way, k_shot, method)]
            best = next((r for r in of if r["template"] == "mean"), of[-1] if of else None)
            cells.append("" if best is None else _cell(best))
        table.add_row(task, "all" if n_way is None else str(n_way), str(k_shot), *cells)
    Console().print(table)


def _cell(row: dict[str, Any]) -> str:
    text = f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
    if "minimum" in row:
        text += f" [{100 * row['minimum']:.1f}–{100 * row['maximum']:.1f}]"
    return text
