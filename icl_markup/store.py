"""The store of a large task: its texts in an Arrow file that `datasets` maps into memory, and an index of its rows.

Rows of all splits stand one after the other. Beside the texts lie arrays of numbers: each row's line, label and state,
and the rows in the order of a hash of their text, by which a text that stands twice is found when the store is written,
and a text's row later. Equal hashes are not yet equal texts: those are compared.

The texts stay on disk; the index takes 29 bytes a row, on disk and in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icl_markup.errors import TaskError
from icl_markup.files import new_folder
from icl_markup.tasks import Example

BLOCK = 2**16
"""Rows that are written together."""

KEPT, REPEATED, LATE = 0, 1, 2
"""States of a row: the first with its text and label; another one of the same split; one that an earlier split has."""

Array = NDArray[Any]


class Clash(NamedTuple):
    """A text in two splits: the row that is in the later one, and the first row."""

    row: int
    first: int


@dataclass(frozen=True)
class Store:
    """A store that was written.

    Attributes:
        folder: where it is.
        splits: the rows of each split, those included that an earlier split has.
        labels: the names of labels, by their numbers.
        clash: the first row whose text an earlier split has.
        lines: the line of each row in the file that it was read from, int64.
        numbers: the label of each row, int32.
        states: the state of each row, uint8.
        order: the rows in the order of their hashes, ascending where these are equal.
        hashes: the hash of each row's text, in that order, uint64.
    """

    folder: Path
    splits: Mapping[str, range]
    labels: tuple[str, ...]
    clash: Clash | None
    lines: Array
    numbers: Array
    states: Array
    order: Array
    hashes: Array

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a store."""
        told = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        splits = {split: range(start, end) for split, start, end in told["splits"]}
        clash = Clash(*told["clash"]) if told["clash"] else None
        arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS]
        return cls(folder, splits, tuple(told["labels"]), clash, *arrays)

    @cached_property
    def texts(self) -> Any:
        """The texts, an Arrow column."""
        return _texts(self.folder)

    def text(self, row: int) -> str:
        """Return the text of a row."""
        return str(self.texts[row].as_py())

    def find(self, text: str) -> Iterator[int]:
        """Yield the rows that have a text, in ascending order."""
        wanted = np.uint64(_hash(text))
        start, end = (int(np.searchsorted(self.hashes, wanted, side)) for side in ("left", "right"))
        yield from (row for row in self.order[start:end].tolist() if self.text(row) == text)


_ARRAYS = ("lines", "numbers", "states", "order", "hashes")


def write_store(folder: Path, name: str, splits: Mapping[str, Iterable[tuple[int, Example]]]) -> None:
    """Write a store, in place of an older one.

    Args:
        folder: where to.
        name: the task's name, for errors.
        splits: lines and examples of each split, in the order that says which copy of a text is the first.

    Raises:
        TaskError: there is no example, or what reading them raises; there is then no new store.
        OSError: it cannot be written.
    """
    with new_folder(folder) as part:
        ends, labels, lines, numbers, unsorted = _write_texts(part, splits)
        if not ends[-1]:
            raise TaskError(f"task {name!r} holds no example")
        order = np.argsort(unsorted, kind="stable")
        hashes = unsorted[order]
        states, clash = _judged(_texts(part), numbers, order, hashes, ends)
        for array, found in zip(_ARRAYS, (lines, numbers, states, order, hashes), strict=True):
            np.save(part / f"{array}.npy", found)
        told = {"splits": list(zip(splits, [0, *ends[:-1]], ends, strict=True)), "labels": labels, "clash": clash}
        (part / "store.json").write_text(json.dumps(told), encoding="utf-8")


def _write_texts(
    folder: Path, splits: Mapping[str, Iterable[tuple[int, Example]]]
) -> tuple[list[int], list[str], Array, Array, Array]:
    """Write the texts; return where the splits end, the labels, and of each row its line, label and hash."""
    # Imported where they are used: `datasets` costs about a second at import.
    import datasets
    import pyarrow
    from datasets.arrow_writer import ArrowWriter

    labels: dict[str, int] = {}
    ends: list[int] = []
    found: list[tuple[Array, Array, Array]] = [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint64))]
    count = 0
    features = datasets.Features({"text": datasets.Value("large_string")})
    writer = ArrowWriter(features=features, path=str(folder / "texts.arrow"), writer_batch_size=BLOCK)
    for examples in splits.values():
        rows = iter(examples)
        while block := list(islice(rows, BLOCK)):
            texts = [example.text for _, example in block]
            writer.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())}))
            of_block = [labels.setdefault(example.label, len(labels)) for _, example in block]
            found.append(
                (
                    np.array([line for line, _ in block], np.int64),
                    np.array(of_block, np.int32),
                    np.array([_hash(text) for text in texts], np.uint64),
                )
            )
            count += len(block)
        ends.append(count)
    writer.finalize()
    lines, numbers, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return ends, list(labels), lines, numbers, hashes


def _judged(
    texts: Any, numbers: Array, order: Array, hashes: Array, ends: list[int]
) -> tuple[Array, tuple[int, int] | None]:
    """Return the state of each row, and the first text of two splits with its first row."""
    states = np.zeros(len(order), np.uint8)
    clash: tuple[int, int] | None = None
    split_of = np.searchsorted(ends, np.arange(len(order)), side="right")
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    groups = np.split(same, np.flatnonzero(np.diff(same) > 1) + 1) if len(same) else []
    for group in groups:
        firsts: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()
        for row in order[group[0] : group[-1] + 2].tolist():
            first = firsts.setdefault(str(texts[row].as_py()), row)
            if split_of[row] != split_of[first]:
                states[row] = LATE
                clash = (row, first) if clash is None or row < clash[0] else clash
            elif (first, label := int(numbers[row])) in seen:
                states[row] = REPEATED
            else:
                seen.add((first, label))
    return states, clash


def _texts(folder: Path) -> Any:
    import datasets

    return datasets.Dataset.from_file(str(folder / "texts.arrow")).data.column("text")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
