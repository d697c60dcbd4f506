"""Examples that lie in a file (`icl_markup.store`): sequences that read a row when it is asked for, and their task.

Episodes drawn from them are those drawn from the same examples in memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from icl_markup.store import KEPT, LATE, Array, Store
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
        prefix: what stands before a line in an example's source.
        rows: their rows in the store, ascending.
    """

    def __init__(self, store: Store, prefix: str, rows: Array):
        self._store = store
        self._prefix = prefix
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = int(self._rows[index])
        return Example(self._store.text(row), self._store.labels[int(self._store.numbers[row])], self.source(row))

    def source(self, row: int) -> str:
        """Return where a row of the store was read."""
        return f"{self._prefix}{int(self._store.lines[row])}"

    def numbers(self) -> Array:
        """Return the label of each example, by its number in the store."""
        return np.asarray(self._store.numbers[self._rows])

    def last(self) -> dict[str, str]:
        """Return where the last example of each label was read."""
        return {self._store.labels[i]: self.source(int(rows[-1])) for i, rows in self._of_labels(self._rows)}

    def _of_labels(self, rows: Array) -> list[tuple[int, Array]]:
        """Return labels in the order in which they first appear, each with its rows."""
        order = np.argsort(self._store.numbers[rows], kind="stable")
        labels, starts = np.unique(self._store.numbers[rows][order], return_index=True)
        parts = np.split(rows[order], starts[1:]) if len(labels) else []
        return sorted(zip(labels.tolist(), parts, strict=True), key=lambda item: int(item[1][0]))

    def by_label(self) -> dict[str, Sequence[str]]:
        """Return the texts of each label, labels in the order in which they first appear."""
        return {self._store.labels[i]: MappedTexts(self._store, rows) for i, rows in self._of_labels(self._rows)}

    def distinct(self) -> dict[str, Texts]:
        """Return the same, a text that stands twice at one label only once, in its first place."""
        kept = self._rows[self._store.states[self._rows] == KEPT]
        return {self._store.labels[i]: MappedTexts(self._store, rows) for i, rows in self._of_labels(kept)}

    def keeping(self, wanted: Callable[[str], bool]) -> MappedExamples:
        """Return the examples whose label is wanted."""
        chosen = np.array([wanted(label) for label in self._store.labels], dtype=bool)
        return MappedExamples(self._store, self._prefix, self._rows[chosen[self.numbers()]])


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
    splits = {
        split: MappedExamples(store, prefixes[split], rows.start + np.flatnonzero(_states(store, rows) != LATE))
        for split, rows in store.splits.items()
    }
    if store.clash is not None and checks.duplicates == "error":
        (late, source), (first, first_source) = (_place(splits, store, row) for row in store.clash)
        raise duplicate_error(name, late, source, first, first_source)
    gone = {split: len(store.splits[split]) - len(examples) for split, examples in splits.items()}
    notes = tuple(dropped_note(count, split) for split, count in gone.items() if count)
    counts: dict[str, int] = {}
    last: dict[str, str] = {}
    for examples in splits.values():
        sizes = np.bincount(examples.numbers(), minlength=len(store.labels))
        counts = counts or dict(zip(store.labels, sizes.tolist(), strict=True))
        last |= examples.last()
    task = Task(name, (), splits, descriptions, description, oos_label, notes)
    return finished_task(task, counts, last, checks)


def _states(store: Store, rows: range) -> Array:
    return np.asarray(store.states[rows.start : rows.stop])


def _place(splits: Mapping[str, MappedExamples], store: Store, row: int) -> tuple[str, str]:
    """Return the split of a row, and where it was read."""
    split = next(split for split, rows in store.splits.items() if row in rows)
    return split, splits[split].source(row)
