"""The store of a large task: its texts in an Arrow file that `datasets` maps into memory, and an index of its rows.

Rows of all splits stand one after the other. Beside the texts lie plain arrays of numbers, which are mapped too: each
row's line, label and state; the rows of each label; and the rows sorted by a hash of their text, by which a text that
stands twice is found when the store is written, and a text's row later. Equal hashes are not yet equal texts: those
are compared.

Whoever writes or reads a store holds a block of rows, the names of the labels, and a few numbers for each of them; the
pages of the files belong to the system, which takes them back when memory is short.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
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
"""Rows that are written, counted or arranged together."""

_SORTED = 2**19
"""About so many rows are sorted by their hash together."""

KEPT, REPEATED, LATE = 0, 1, 2
"""States of a row: the first with its text and label; another one of the same split; one that an earlier split has."""

Array = NDArray[Any]


class Arranged(NamedTuple):
    """Rows of a split by label: those of label `i` are ``rows[starts[i] : starts[i + 1]]``, in ascending order."""

    rows: Array
    starts: NDArray[np.int64]

    def of(self, label: int) -> Array:
        """Return the rows of a label."""
        return self.rows[int(self.starts[label]) : int(self.starts[label + 1])]


class Clash(NamedTuple):
    """A text in two splits: the row that is in the later one, and the first row."""

    row: int
    first: int


@dataclass(frozen=True)
class Store:
    """A store that was written; every array is mapped from its file.

    Attributes:
        folder: where it is.
        splits: the rows of each split, those included that an earlier split has.
        labels: the names of labels, by their numbers.
        clash: the first row whose text an earlier split has.
    """

    folder: Path
    splits: Mapping[str, range]
    labels: tuple[str, ...]
    clash: Clash | None

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a store."""
        told = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        splits = {split: range(start, end) for split, start, end in told["splits"]}
        return cls(folder, splits, tuple(told["labels"]), Clash(*told["clash"]) if told["clash"] else None)

    @cached_property
    def texts(self) -> Any:
        """The texts, an Arrow column."""
        # Imported where it is used: `datasets` costs about a second at import.
        import datasets

        return datasets.Dataset.from_file(str(self.folder / "texts.arrow")).data.column("text")

    @cached_property
    def lines(self) -> Array:
        """The line of each row in the file that it was read from."""
        return _mapped(self.folder / "lines", np.int64)

    @cached_property
    def numbers(self) -> Array:
        """The label of each row."""
        return _mapped(self.folder / "labels", np.int32)

    @cached_property
    def states(self) -> Array:
        """The state of each row."""
        return _mapped(self.folder / "states", np.uint8)

    @cached_property
    def _by_hash(self) -> tuple[Array, Array]:
        return _mapped(self.folder / "hashes", np.uint64), _mapped(self.folder / "hashed", _of_rows(len(self.lines)))

    def text(self, row: int) -> str:
        """Return the text of a row."""
        return str(self.texts[row].as_py())

    def find(self, text: str) -> Iterator[int]:
        """Yield the rows that have a text, in ascending order."""
        hashes, rows = self._by_hash
        wanted = _hash(text)
        place = bisect_left(hashes, wanted)
        while place < len(hashes) and hashes[place] == wanted:
            row = int(rows[place])
            if self.text(row) == text:
                yield row
            place += 1

    def arranged(self, split: str, *, distinct: bool) -> Arranged:
        """Return the rows of a split by label, without those that an earlier split has.

        Args:
            split: the split.
            distinct: without those that repeat an earlier row, too.
        """
        name = f"{list(self.splits).index(split)}-{'distinct' if distinct else 'all'}"
        starts = np.fromfile(self.folder / f"{name}.starts", np.int64)
        return Arranged(_mapped(self.folder / f"{name}.rows", _of_rows(len(self.lines))), starts)


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
        ends, labels = _write_rows(part, splits)
        if not ends[-1]:
            raise TaskError(f"task {name!r} holds no example")
        starts = [0, *ends[:-1]]
        told: dict[str, Any] = {"splits": list(zip(splits, starts, ends, strict=True)), "labels": labels, "clash": None}
        _write_json(part, told)
        told["clash"] = _sort(Store.open(part), ends)
        _write_json(part, told)
        store = Store.open(part)
        for split in splits:
            _arrange(store, split, distinct=False)
            _arrange(store, split, distinct=True)


def _write_json(folder: Path, told: dict[str, Any]) -> None:
    (folder / "store.json").write_text(json.dumps(told), encoding="utf-8")


def _write_rows(folder: Path, splits: Mapping[str, Iterable[tuple[int, Example]]]) -> tuple[list[int], list[str]]:
    """Write what is known of each row by itself; return where the splits end, and the names of the labels."""
    import datasets
    import pyarrow
    from datasets.arrow_writer import ArrowWriter

    labels: dict[str, int] = {}
    ends: list[int] = []
    count = 0
    features = datasets.Features({"text": datasets.Value("large_string")})
    with (
        (folder / "lines").open("wb") as lines,
        (folder / "labels").open("wb") as numbers,
        (folder / "unsorted").open("wb") as hashes,
    ):
        writer = ArrowWriter(features=features, path=str(folder / "texts.arrow"), writer_batch_size=BLOCK)
        for examples in splits.values():
            rows = iter(examples)
            while block := list(islice(rows, BLOCK)):
                texts = [example.text for _, example in block]
                writer.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())}))
                lines.write(np.array([line for line, _ in block], np.int64).tobytes())
                of_block = [labels.setdefault(example.label, len(labels)) for _, example in block]
                numbers.write(np.array(of_block, np.int32).tobytes())
                hashes.write(np.array([_hash(text) for text in texts], np.uint64).tobytes())
                count += len(block)
            ends.append(count)
        writer.finalize()
    return ends, list(labels)


def _sort(store: Store, ends: list[int]) -> Clash | None:
    """Write the rows in the order of their hashes, and their states; return the first text of two splits."""
    folder, total = store.folder, len(store.lines)
    unsorted = _mapped(folder / "unsorted", np.uint64)
    states = np.memmap(folder / "states", np.uint8, "w+", shape=(total,))
    bits = max(0, (total // _SORTED).bit_length())
    clash: Clash | None = None
    with (folder / "hashes").open("wb") as hashes, (folder / "hashed").open("wb") as hashed:
        # One part of all hashes after the other, the lowest first: what is sorted at once does not grow.
        for part in range(2**bits):
            found = [
                start + np.flatnonzero(unsorted[start : start + BLOCK] >> np.uint64(64 - bits) == part)
                for start in range(0, total if bits else 0, BLOCK)
            ]
            rows = np.concatenate(found) if bits else np.arange(total)
            values = unsorted[rows]
            order = np.argsort(values, kind="stable")
            rows, values = rows[order], values[order]
            hashes.write(values.tobytes())
            hashed.write(rows.astype(_of_rows(total)).tobytes())
            for group in _equal(rows, values):
                clash = _judge(store, group, ends, states, clash)
    states.flush()
    (folder / "unsorted").unlink()
    return clash


def _equal(rows: Array, values: Array) -> Iterator[list[int]]:
    """Yield the rows, ascending, that share a hash with others."""
    same = np.flatnonzero(values[1:] == values[:-1])
    firsts = same[np.append(True, np.diff(same) > 1)] if len(same) else same
    lasts = same[np.append(np.diff(same) > 1, True)] + 1 if len(same) else same
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield rows[first : last + 1].tolist()


def _judge(store: Store, rows: list[int], ends: list[int], states: Array, clash: Clash | None) -> Clash | None:
    """Set the states of rows of one hash; return the earliest clash so far."""
    firsts: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for row in rows:
        first = firsts.setdefault(store.text(row), row)
        if _split(row, ends) != _split(first, ends):
            states[row] = LATE
            if clash is None or row < clash.row:
                clash = Clash(row, first)
        elif (first, label := int(store.numbers[row])) in seen:
            states[row] = REPEATED
        else:
            seen.add((first, label))
    return clash


def _split(row: int, ends: list[int]) -> int:
    return next(number for number, end in enumerate(ends) if row < end)


def _arrange(store: Store, split: str, *, distinct: bool) -> None:
    """Write the rows of a split by label: a counting sort, block by block."""
    name = f"{list(store.splits).index(split)}-{'distinct' if distinct else 'all'}"
    most, labels = KEPT if distinct else REPEATED, len(store.labels)
    counts = np.zeros(labels, np.int64)
    for _, numbers in _blocks(store, split, most):
        counts += np.bincount(numbers, minlength=labels)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    starts.tofile(store.folder / f"{name}.starts")
    # A file of nothing cannot be mapped.
    shape = (max(1, int(starts[-1])),)
    out = np.memmap(store.folder / f"{name}.rows", _of_rows(len(store.lines)), "w+", shape=shape)
    cursor = starts[:-1].copy()
    for rows, numbers in _blocks(store, split, most):
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        out[cursor[ordered] + np.arange(len(ordered)) - np.searchsorted(ordered, ordered)] = rows[order]
        cursor += np.bincount(numbers, minlength=labels)
    out.flush()


def _blocks(store: Store, split: str, most: int) -> Iterator[tuple[Array, Array]]:
    """Yield rows whose state is at most `most`, and their labels."""
    rows = store.splits[split]
    for start in range(rows.start, rows.stop, BLOCK):
        end = min(start + BLOCK, rows.stop)
        kept = start + np.flatnonzero(store.states[start:end] <= most)
        yield kept, store.numbers[kept]


def _mapped(path: Path, kind: Any) -> Array:
    return np.asarray(np.memmap(path, kind, "r"))  # reading single numbers is slower through the subclass


def _of_rows(count: int) -> Any:
    """Return the smallest type that holds the numbers of so many rows."""
    return np.min_scalar_type(count)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
