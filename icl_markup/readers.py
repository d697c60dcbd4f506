"""Reads tasks from JSONL, CSV/TSV, Parquet, task folders, and `datasets` data sets on disk or on the hub.

A task folder holds one ``SPLIT.jsonl`` a split and, optionally, ``meta.json`` with ``name``, ``oos_label``,
``label_descriptions`` and ``description``.

A large task stays on disk (`icl_markup.store`), beside what `datasets` keeps; a small one is held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from icl_markup.errors import TaskError, nearest
from icl_markup.files import reported
from icl_markup.rows import KINDS, rows_of
from icl_markup.tasks import Example, Task, TaskChecks, checked_example, checked_task
from icl_markup.text import is_encodable

MOST_HELD = 2**26
"""A task of more bytes is left on disk unless its source says otherwise: in memory it takes several times as many."""

_STORE_VERSION = 2

_SPLIT_ORDER = ("train", "validation", "dev", "test")


@dataclass(frozen=True)
class TaskSource:
    """Where a task comes from and how to read it."""

    path: str
    """A JSONL, CSV, TSV or Parquet file, a task folder, a data set saved by `datasets`, or a hub data set's name."""

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

    in_memory: bool | None = None
    """Hold every text in memory, or leave them in a file of the cache of `datasets`, which is written once; null: in
    memory up to 64 MiB of data. Examples and episodes are the same."""


def without_storage(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's plain data without where its tasks' texts are kept, which no episode depends on."""
    found = dict(config)
    for key in ("tasks", "validation_tasks"):
        found[key] = [{k: v for k, v in task.items() if k != "in_memory"} for task in config[key]]
    return found


class _Part(NamedTuple):
    """A split before it is read."""

    prefix: str
    """What stands before a line in an example's source."""
    examples: Callable[[], Iterator[tuple[int, Example]]]
    bytes: int
    version: list[Any]
    """Says whether it is still the same."""


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
        parts = {source.split: _file_part(path, source)}
    elif path.is_dir() and any(path.glob("*.jsonl")):
        meta = _read_meta(path / "meta.json")
        files = sorted(path.glob("*.jsonl"), key=lambda p: _split_rank(p.stem))
        parts = {file.stem: _file_part(file, source) for file in files}
    elif path.is_dir():
        parts = _dataset_parts(source, on_disk=True)
    elif path.suffix in {*KINDS, ".json"} or path.is_absolute() or source.path.startswith("."):
        raise TaskError(f"{source.path}: no such file or folder")
    else:
        parts = _dataset_parts(source, on_disk=False)
    task = _task(
        source,
        parts,
        name=source.name or str(meta.get("name") or path.stem),
        descriptions={str(k): str(v) for k, v in dict(meta.get("label_descriptions") or {}).items()},
        description=source.description or str(meta.get("description") or ""),
        oos_label=source.oos_label or meta.get("oos_label"),
    )
    if source.oos_label and not any(task.out_of_scope(split) for split in task.splits):
        raise TaskError(
            f"{source.path}: oos_label {source.oos_label!r} is no label{nearest(source.oos_label, task.labels)}"
        )
    if not source.with_oos:
        task = task.without_oos()
    wanted = _wanted_labels(task, source)
    return task if wanted is None else task.only_labels(wanted)


def _task(source: TaskSource, parts: Mapping[str, _Part], *, name: str, **more: Any) -> Task:
    """Read and check a task, into memory or into a store, unless that was written before."""
    size = sum(part.bytes for part in parts.values())
    if source.in_memory or (source.in_memory is None and size <= MOST_HELD):
        splits = {split: [example for _, example in part.examples()] for split, part in parts.items()}
        return checked_task(name, splits, checks=source.checks, **more)
    # Imported where they are used: they need `datasets`, which costs about a second at import.
    import datasets

    from icl_markup.mapped import mapped_task
    from icl_markup.store import Store, write_store

    read_by = [source.text_column, source.label_column, source.label_names, source.only]
    told = [_STORE_VERSION, *read_by, [[split, part.version] for split, part in parts.items()]]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "icl_markup" / digest
    if not folder.exists():
        with reported(TaskError, folder, "make room, or set HF_DATASETS_CACHE"):
            write_store(folder, name, {split: _checked(part, name) for split, part in parts.items()})
    prefixes = {split: part.prefix for split, part in parts.items()}
    return mapped_task(name, Store.open(folder), prefixes, checks=source.checks, **more)


def _checked(part: _Part, name: str) -> Iterator[tuple[int, Example]]:
    return ((line, checked_example(example, name)) for line, example in part.examples())


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


def _file_part(path: Path, source: TaskSource) -> _Part:
    def examples() -> Iterator[tuple[int, Example]]:
        for line, row in rows_of(path):
            if _wanted(row, source):
                yield line, example_of(row, f"{path}:{line}", source)

    found = path.stat()
    return _Part(f"{path}:", examples, found.st_size, [str(path.resolve()), found.st_size, found.st_mtime_ns])


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


def _dataset_parts(source: TaskSource, *, on_disk: bool) -> dict[str, _Part]:
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
    return {split: _dataset_part(split, parts[split], source) for split in sorted(parts, key=_split_rank)}


def _dataset_part(split: str, rows: Any, source: TaskSource) -> _Part:
    place = f"{source.path}[{split}]:"
    names = getattr(rows.features.get(source.label_column), "names", None)

    def examples() -> Iterator[tuple[int, Example]]:
        columns = [column for column in (source.text_column, source.label_column) if column in rows.column_names]
        read = rows.select_columns(columns) if len(set(columns)) == 2 else rows  # an error shows every column
        index = 0
        for block in read.iter(batch_size=1000):
            for values in zip(*block.values(), strict=True):
                row = dict(zip(block, values, strict=True))
                label = row.get(source.label_column)
                if names is not None and label is not None:
                    if label < 0:
                        raise TaskError(f"{place}{index}: the row has no label ({label})")
                    row[source.label_column] = names[label]
                yield index, example_of(row, f"{place}{index}", source)
                index += 1

    files = [Path(file["filename"]) for file in rows.cache_files]
    found = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return _Part(place, examples, rows.data.nbytes, [rows._fingerprint, *found])
