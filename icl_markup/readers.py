"""Reads tasks from JSONL, CSV/TSV, task folders, and `datasets` data sets on disk or on the hub.

A task folder holds one ``SPLIT.jsonl`` a split and, optionally, ``meta.json`` with ``name``, ``oos_label``,
``label_descriptions`` and ``description``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icl_markup.errors import TaskError, nearest
from icl_markup.tasks import Example, Task, TaskChecks, checked_task
from icl_markup.text import is_encodable

_SPLIT_ORDER = ("train", "validation", "dev", "test")


@dataclass(frozen=True)
class TaskSource:
    """Where a task comes from and how to read it."""

    path: str
    """A JSONL, CSV or TSV file, a task folder, a data set saved by `datasets`, or a hub data set's name."""

    name: str | None = None
    """The task's name; by default that of the file or folder."""

    text_column: str = "text"
    """The column (or key) that holds the text."""

    label_column: str = "label"
    """The column (or key) that holds the label."""

    split: str = "train"
    """The split that a single file is read as."""

    config_name: str | None = None
    """A hub data set's configuration, where it has several."""

    revision: str | None = None
    """A hub data set's revision (commit, tag or branch)."""

    label_names: dict[str, str] = field(default_factory=dict)
    """Readable names for raw labels; a raw label that is not listed has its underscores replaced by spaces."""

    labels: list[str] | None = None
    """Restrict the task to these label names."""

    without_labels: list[str] = field(default_factory=list)
    """Leave these label names out."""

    oos_label: str | None = None
    """The label that means out-of-scope, as a readable name."""

    only: dict[str, list[str]] = field(default_factory=dict)
    """Keep only the rows of a file whose value in a column is one of these; rows that have no such value stay."""

    with_oos: bool = True
    """Keep the out-of-scope texts; false leaves them out."""

    description: str = ""
    """One sentence about the task, for templates that use the field {task}."""

    checks: TaskChecks = field(default_factory=TaskChecks)
    """What to do about defects."""


def read_task(source: TaskSource | str | Path) -> Task:
    """Read one task.

    Args:
        source: a path or hub name, or a `TaskSource` for anything that is not called ``text`` and ``label``.

    Raises:
        TaskError: the file is missing or malformed, a column is missing, or a check fails; with file and line.
    """
    if not isinstance(source, TaskSource):
        source = TaskSource(str(source))
    path = Path(source.path).expanduser()
    meta: Mapping[str, Any] = {}
    if path.is_file():
        splits = {source.split: _read_rows(path, source)}
    elif path.is_dir() and any(path.glob("*.jsonl")):
        meta = _read_meta(path / "meta.json")
        files = sorted(path.glob("*.jsonl"), key=lambda p: _split_rank(p.stem))
        splits = {file.stem: _read_rows(file, source) for file in files}
    elif path.is_dir():
        splits = _from_dataset(source, on_disk=True)
    elif path.suffix in {".jsonl", ".csv", ".tsv", ".json"} or path.is_absolute() or source.path.startswith("."):
        raise TaskError(f"{source.path}: no such file or folder")
    else:
        splits = _from_dataset(source, on_disk=False)
    described = {str(k): str(v) for k, v in dict(meta.get("label_descriptions") or {}).items()}
    task = checked_task(
        source.name or str(meta.get("name") or path.stem),
        splits,
        descriptions=described,
        description=source.description or str(meta.get("description") or ""),
        oos_label=source.oos_label or meta.get("oos_label"),
        checks=source.checks,
    )
    if source.oos_label and not any(task.out_of_scope(split) for split in task.splits):
        raise TaskError(
            f"{source.path}: oos_label {source.oos_label!r} is no label{nearest(source.oos_label, task.labels)}"
        )
    if not source.with_oos:
        task = task.without_oos()
    wanted = _wanted_labels(task, source)
    return task if wanted is None else task.only_labels(wanted)


def _wanted_labels(task: Task, source: TaskSource) -> list[str] | None:
    if source.labels is None and not source.without_labels:
        return None
    for label in [*(source.labels or []), *source.without_labels]:
        if label not in task.labels:
            raise TaskError(f"{source.path}: the task has no label {label!r}{nearest(label, task.labels)}")
    kept = [label for label in source.labels or task.labels if label not in source.without_labels]
    if len(set(kept)) < 2:
        raise TaskError(f"{source.path}: labels and without_labels leave {len(set(kept))} label(s); keep two or more")
    return kept


def _split_rank(name: str) -> tuple[int, str]:
    return (_SPLIT_ORDER.index(name) if name in _SPLIT_ORDER else len(_SPLIT_ORDER), name)


def _read_meta(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise TaskError(f"{path}: expected a JSON object, found {type(meta).__name__}")
    if not isinstance(meta.get("label_descriptions") or {}, dict):
        raise TaskError(f"{path}: label_descriptions is no object that maps label names to descriptions")
    return meta


def _read_rows(path: Path, source: TaskSource) -> list[Example]:
    return [example_of(row, f"{path}:{line}", source) for line, row in rows_of(path) if _wanted(row, source)]


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read a JSONL, CSV or TSV file row by row, in constant memory.

    Yields:
        Line numbers and rows.

    Raises:
        TaskError: the file cannot be read, is of another kind, or a row is malformed; the message names the line.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".jsonl": _jsonl_rows,
        ".csv": lambda p: _csv_rows(p, ","),
        ".tsv": lambda p: _csv_rows(p, "\t"),
    }
    if path.suffix.lower() not in readers:
        raise TaskError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl, .csv or .tsv")
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}:{_bad_line(path)}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _bad_line(path: Path) -> int:
    """Return the first line that is not UTF-8; the decoder counts bytes of what it read last."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}:{number}: expected a JSON object a line, found {type(row).__name__}")
            yield number, row


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        header = False
        while True:
            line = reader.line_num + 1
            try:
                if not header:
                    header = reader.fieldnames is not None
                    line = reader.line_num + 1
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise TaskError(f"{path}:{line}: malformed CSV: {error}") from error
            if None in row:
                raise TaskError(f"{path}:{reader.line_num}: more fields than the header has columns; quote the text")
            yield reader.line_num, row


def _wanted(row: Mapping[str, Any], source: TaskSource) -> bool:
    return all(row.get(column) is None or str(row[column]) in kept for column, kept in source.only.items())


def example_of(row: Mapping[str, Any], place: str, source: TaskSource) -> Example:
    """Read text and label off a row.

    Raises:
        TaskError: a column is missing or empty, or holds no text; the message names `place`.
    """
    for column in (source.text_column, source.label_column):
        if column in row and row[column] is None:
            raise TaskError(f"{place}: column {column!r} is empty; remove the row or fill it in")
        if column not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise TaskError(f"{place}: no column {column!r}, only {found}; set text_column and label_column")
    text = row[source.text_column]
    if not isinstance(text, str):
        raise TaskError(f"{place}: the text is {type(text).__name__}, not a string")
    if not text.strip():
        raise TaskError(f"{place}: the text is empty; remove the row or fill it in")
    if not is_encodable(text) or not is_encodable(str(row[source.label_column])):
        raise TaskError(f"{place}: the row holds half of a surrogate pair, which is no text; remove it")
    return Example(text, _readable(row[source.label_column], source), place)


def _readable(raw: Any, source: TaskSource) -> str:
    raw = str(raw)
    return source.label_names.get(raw) or raw.replace("_", " ").strip()


def _from_dataset(source: TaskSource, *, on_disk: bool) -> dict[str, list[Example]]:
    # Imported where it is used: `datasets` costs about a second at import.
    import datasets

    try:
        if on_disk:
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, source.config_name, revision=source.revision)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise TaskError(
            f"{source.path}: neither a file, a task folder, a saved data set nor a reachable hub data set ({error})"
        ) from error
    parts = loaded if isinstance(loaded, dict) else {source.split: loaded}
    splits: dict[str, list[Example]] = {}
    for split in sorted(parts, key=_split_rank):
        feature = parts[split].features.get(source.label_column)
        names = getattr(feature, "names", None)
        rows = []
        for index, raw in enumerate(parts[split]):
            row = raw
            if names is not None and raw.get(source.label_column) is not None:
                index_of_class = raw[source.label_column]
                if index_of_class < 0:
                    raise TaskError(f"{source.path}[{split}]:{index}: the row has no label ({index_of_class})")
                row = {**raw, source.label_column: names[index_of_class]}
            rows.append(example_of(row, f"{source.path}[{split}]:{index}", source))
        splits[split] = rows
    return splits
