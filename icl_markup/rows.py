"""Reads files row by row, in constant memory: JSONL, CSV, TSV and Parquet, each row with the line that it came from."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icl_markup.errors import TaskError

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
"""The kinds of files, by their suffix."""


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read a JSONL, CSV, TSV or Parquet file row by row, in constant memory.

    Yields:
        Line numbers (of a Parquet file: row numbers, from 0) and rows.

    Raises:
        TaskError: the file cannot be read, is of another kind, or a row is malformed; the message names the line.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".jsonl": _jsonl_rows,
        ".csv": lambda p: _csv_rows(p, ","),
        ".tsv": lambda p: _csv_rows(p, "\t"),
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise TaskError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl, .csv, .tsv or .parquet")
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Imported where they are used: few files are of this kind.
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except pyarrow.ArrowException as error:
        raise TaskError(f"{path}:{number}: not readable as Parquet: {error}") from error
