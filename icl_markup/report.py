"""Shows rows of results: as a table on the terminal, and as a page of tables and figures (``icl-markup report``)."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.errors import ConfigError
from icl_markup.files import write_whole
from icl_markup.report_grid import by_setting, only, summarise, tasks_of
from icl_markup.report_rows import parse_row, read_rows
from icl_markup.tables import with_interval


def print_rows(rows: Sequence[dict[str, Any]], experiment: str) -> None:
    """Print an experiment's accuracies: a table for each setting, with a line for a method and a column for a task.

    Args:
        rows: rows of results, of any experiment and kind.
        experiment: the experiment to print.

    Raises:
        ConfigError: a row lacks a key, or two rows measure the same thing and differ.
    """
    parsed = [parse_row(row, f"row {number}") for number, row in enumerate(rows, 1) if row["experiment"] == experiment]
    for setting, of_setting in by_setting([row for row in parsed if row.metric == "accuracy"]).items():
        shown = only(summarise(row for row in of_setting if row.kind == "measure")[0], ["accuracy"])
        if not shown:
            continue
        table = Table(title=escape(f"{experiment}: accuracy, % (95 % interval), {setting.label}"))
        tasks = tasks_of(shown)
        for heading in ("method", *tasks):
            table.add_column(escape(heading), overflow="fold")
        for label, by_task in shown.items():
            found = [by_task.get((task, "accuracy")) for task in tasks]
            table.add_row(escape(label), *("" if row is None else escape(with_interval(row)) for row in found))
        Console().print(table)


def write_report(paths: Sequence[Path], out: Path, *, figures: Path | None = None, command: str) -> Path:
    """Write a page of tables and figures about rows of results; equal rows give equal bytes, in any order.

    Args:
        paths: JSONL files of rows.
        out: the page to write, such as ``results/README.md``; it is replaced whole or not at all.
        figures: the folder of its figures; by default ``figures`` beside the page.
        command: the command that makes the page again; it is named in the page.

    Returns:
        `out`.

    Raises:
        ConfigError: there is no row; a file cannot be read or written; a line is no row, or of an unknown kind (the
            message names file and line); two rows measure the same thing, and differ.
    """
    from icl_markup.results_page import build_page  # loads matplotlib, which the terminal's table does without

    rows = read_rows(paths)
    if not rows:
        raise ConfigError(f"{', '.join(map(str, paths)) or 'no file'}: no rows to report; measure something first")
    folder = out.parent / "figures" if figures is None else figures

    def link(name: str) -> str:
        return urllib.parse.quote(Path(os.path.relpath(folder / name, out.parent)).as_posix())

    page, images = build_page(rows, command, link)
    try:
        for name, content in images.items():
            _replace(folder / name, content)
        _replace(out, page.encode())
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    return out


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
