"""Examples that lie in a file (`icl_markup.store`): sequences that read a row when it is asked for, and their task.

Episodes drawn from them are those drawn from the same examples in memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from icl_markup.store import BLOCK, REPEATED, Array, Store
from icl_markup.tasks import Example, Task, TaskChecks, Texts, dropped_note, duplicate_error, finished_task


class MappedTexts(Sequence[str]):
    """Texts of one label.

    Args:
        store: where they lie.
        rows: their rows, ascending.
    """

    def __init__(self, store: Store, rows: Array):
        self._store = store
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._store.text(int(self._rows[index]))

    def find(self, text: str) -> int | None:
        """Return where a text first stands, or None where it is none of these."""
        for row in self._store.find(text):
            place = bisect_left(self._rows, row)
            if place < len(self._rows) and self._rows[place] == row:
                return place
        return None


class MappedExamples(Sequence[Example]):
    """The examples of a split, or those of some labels; see `icl_markup.tasks.Examples`.

    Args:
        store: where they lie.
        split: the split.
        prefix: what stands before a line in an example's source.
        wanted: of each of the store's labels whether its examples are among these.
    """

    def __init__(self, store: Store, split: str, prefix: str, wanted: NDArray[np.bool_]):
        self._store = store
        self._split = split
        self._prefix = prefix
        self._wanted = wanted
        self._range = store.splits[split]
        # Which rows are among these is found out a block at a time; only how many a block has is kept of all.
        self._ends = np.cumsum([len(self._kept(block)) for block in range(-(-len(self._range) // BLOCK))])
        self._last: tuple[int, Array] | None = None

    def _kept(self, block: int) -> Array:
        """Return which rows of a block are among these."""
        start = self._range.start + block * BLOCK
        end = min(start + BLOCK, self._range.stop)
        chosen = (self._store.states[start:end] <= REPEATED) & self._wanted[self._store.numbers[start:end]]
        return start + np.flatnonzero(chosen)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        block = int(np.searchsorted(self._ends, place, side="right"))
        last = self._last
        if last is None or last[0] != block:
            last = self._last = block, self._kept(block)
        row = int(last[1][place - int(self._ends[block])])
        return Example(self._store.text(row), self._label(row), self.source(row))

    def __iter__(self) -> Iterator[Example]:
        for block in range(len(self._ends)):
            for row in self._kept(block).tolist():
                yield Example(self._store.text(row), self._label(row), self.source(row))

    def _label(self, row: int) -> str:
        return self._store.labels[int(self._store.numbers[row])]

    def source(self, row: int) -> str:
        """Return where a row of the store was read."""
        return f"{self._prefix}{int(self._store.lines[row])}"

    def _arranged(self, *, distinct: bool) -> dict[str, MappedTexts]:
        found = self._store.arranged(self._split, distinct=distinct)
        labels = np.flatnonzero((np.diff(found.starts) > 0) & self._wanted)
        first = np.argsort(found.rows[found.starts[labels]])
        return {self._store.labels[i]: MappedTexts(self._store, found.of(i)) for i in labels[first].tolist()}

    def by_label(self) -> dict[str, Sequence[str]]:
        """Return the texts of each label, labels in the order in which they first appear."""
        return dict(self._arranged(distinct=False))

    def distinct(self) -> dict[str, Texts]:
        """Return the same, a text that stands twice at one label only once, in its first place."""
        return dict(self._arranged(distinct=True))

    def keeping(self, wanted: Callable[[str], bool]) -> MappedExamples:
        """Return the examples whose label is wanted."""
        chosen = self._wanted & np.array([wanted(label) for label in self._store.labels], dtype=bool)
        return MappedExamples(self._store, self._split, self._prefix, chosen)


def mapped_task(
    name: str,
    store: Store,
    prefixes: Mapping[str, str],
    *,
    descriptions: Mapping[str, str],
    description: str,
    oos_label: str | None,
    checks: TaskChecks,
) -> Task:
    """Build a task of a store's examples after the checks that `icl_markup.tasks.checked_task` makes.

    Args:
        name: the task's name.
        store: the store.
        prefixes: of each split what stands before a line in an example's source.
        descriptions: longer explanations by label name.
        description: one sentence about the task.
        oos_label: which label, if any, means out-of-scope.
        checks: what to do about defects.

    Raises:
        TaskError: a defect that `checks` does not allow to be dropped; the message names file and line.
    """
    every = np.ones(len(store.labels), dtype=bool)
    splits = {split: MappedExamples(store, split, prefixes[split], every) for split in store.splits}
    if store.clash is not None and checks.duplicates == "error":
        (late, source), (first, first_source) = (_place(splits, store, row) for row in store.clash)
        raise duplicate_error(name, late, source, first, first_source)
    gone = {split: len(store.splits[split]) - len(examples) for split, examples in splits.items()}
    notes = tuple(dropped_note(count, split) for split, count in gone.items() if count)
    counts: dict[str, int] = {}
    last: dict[str, str] = {}
    for split, examples in splits.items():
        found = store.arranged(split, distinct=False)
        sizes = np.diff(found.starts)
        counts = counts or dict(zip(store.labels, sizes.tolist(), strict=True))
        last |= {store.labels[i]: examples.source(int(found.of(i)[-1])) for i in np.flatnonzero(sizes).tolist()}
    task = Task(name, (), splits, descriptions, description, oos_label, notes)
    return finished_task(task, counts, last, checks)


def _place(splits: Mapping[str, MappedExamples], store: Store, row: int) -> tuple[str, str]:
    """Return the split of a row, and where it was read."""
    split = next(split for split, rows in store.splits.items() if row in rows)
    return split, splits[split].source(row)
