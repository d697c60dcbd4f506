"""A task: labelled texts with readable label names, and the checks that make it fit for episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

from icl_markup.errors import TaskError

NONE_OF_THE_ABOVE = "none of the above"
"""The option, and the answer, that a text has which fits none of the labels."""


class Example(NamedTuple):
    """One labelled text and where it was read, as ``file:line`` (empty where it was made in memory)."""

    text: str
    label: str
    source: str = ""


class Texts(Protocol):
    """Distinct texts of one label, in order, wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...

    def find(self, text: str) -> int | None:
        """Return where a text stands, or None where it is none of these."""


class Examples(Protocol):
    """The examples of a split, in order, wherever they lie: in memory, or in a file (`icl_markup.mapped`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def __iter__(self) -> Iterator[Example]: ...

    def by_label(self) -> dict[str, Sequence[str]]:
        """Return the texts of each label, labels in the order in which they first appear."""

    def distinct(self) -> dict[str, Texts]:
        """Return the same, a text that stands twice at one label only once, in its first place."""

    def keeping(self, wanted: Callable[[str], bool]) -> Examples:
        """Return the examples whose label is wanted."""


class HeldTexts(tuple[str, ...]):
    """Distinct texts in memory."""

    @cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self)}

    def find(self, text: str) -> int | None:
        """Return where a text stands, or None where it is none of these."""
        return self._places.get(text)


class HeldExamples(tuple[Example, ...]):
    """Examples in memory; see `Examples`."""

    def by_label(self) -> dict[str, Sequence[str]]:
        """Return the texts of each label, labels in the order in which they first appear."""
        texts: dict[str, list[str]] = {}
        for example in self:
            texts.setdefault(example.label, []).append(example.text)
        return dict(texts)

    def distinct(self) -> dict[str, Texts]:
        """Return the same, a text that stands twice at one label only once, in its first place."""
        return {label: HeldTexts(dict.fromkeys(texts)) for label, texts in self.by_label().items()}

    def keeping(self, wanted: Callable[[str], bool]) -> HeldExamples:
        """Return the examples whose label is wanted."""
        return HeldExamples(example for example in self if wanted(example.label))


@dataclass(frozen=True)
class Task:
    """Labelled texts of one classification problem.

    Attributes:
        name: a short name, used in results.
        labels: readable label names, without the out-of-scope label, in a fixed order.
        splits: examples by split name (``train``, ``validation``, ``test`` …). Out-of-scope examples carry
            `oos_label`.
        descriptions: optional longer explanations, keyed by label name.
        description: one sentence about the task, or an empty string.
        oos_label: the name of the out-of-scope label in `splits`, or None where every text has a label.
        notes: what the checks removed, in words.
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, Examples]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    oos_label: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        held = {s: HeldExamples(e) if isinstance(e, (tuple, list)) else e for s, e in self.splits.items()}
        object.__setattr__(self, "splits", held)

    def by_label(self, split: str) -> dict[str, Sequence[str]]:
        """Return the texts of `split` by label name; labels without a text are absent, and so is out-of-scope.

        Raises:
            TaskError: the task has no such split.
        """
        return {label: texts for label, texts in self.split(split).by_label().items() if label != self.oos_label}

    def distinct(self, split: str) -> dict[str, Texts]:
        """Return the same, a text that stands twice at one label only once."""
        return {label: texts for label, texts in self.split(split).distinct().items() if label != self.oos_label}

    def out_of_scope(self, split: str) -> Sequence[str]:
        """Return the out-of-scope texts of `split`."""
        return [] if self.oos_label is None else self.split(split).by_label().get(self.oos_label, [])

    def split(self, name: str) -> Examples:
        """Return the examples of a split.

        Raises:
            TaskError: the task has no such split.
        """
        if name not in self.splits:
            raise TaskError(f"task {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def without_oos(self) -> Task:
        """Return the task without its out-of-scope texts."""
        return replace(self, splits=self._keeping(lambda label: label != self.oos_label), oos_label=None)

    def _keeping(self, wanted: Callable[[str], bool]) -> dict[str, Examples]:
        return {split: examples.keeping(wanted) for split, examples in self.splits.items()}

    def only_labels(self, labels: Iterable[str], name: str | None = None) -> Task:
        """Return the task restricted to `labels` (out-of-scope examples stay), under another name if given.

        Raises:
            TaskError: a label is not one of the task's.
        """
        keep = set(labels)
        unknown = keep - set(self.labels)
        if unknown:
            raise TaskError(f"task {self.name!r} has no label {sorted(unknown)[0]!r}")
        return replace(
            self,
            name=name or self.name,
            labels=tuple(label for label in self.labels if label in keep),
            splits=self._keeping(lambda label: label in keep or label == self.oos_label),
            descriptions={k: v for k, v in self.descriptions.items() if k in keep},
        )


@dataclass(frozen=True)
class TaskChecks:
    """What to do about defects of a data set."""

    min_examples: int = 1
    """A label with fewer examples in the first split than this is a defect."""

    rare_labels: Literal["error", "drop"] = "error"
    """Labels with too few examples: stop, or drop them from every split and say so."""

    duplicates: Literal["error", "drop"] = "error"
    """A text that stands in two splits: stop, or drop it from the later one and say so."""


def checked_task(
    name: str,
    splits: Mapping[str, Iterable[Example]],
    *,
    descriptions: Mapping[str, str] | None = None,
    description: str = "",
    oos_label: str | None = None,
    checks: TaskChecks | None = None,
) -> Task:
    """Build a task after checking it: empty texts, too few examples of a label, duplicates across splits.

    Args:
        name: the task's name.
        splits: examples by split; the order of the splits says which copy of a duplicate stays.
        descriptions: longer explanations by label name.
        description: one sentence about the task.
        oos_label: which label, if any, means out-of-scope.
        checks: what to do about defects (default: every defect is an error).

    Raises:
        TaskError: a defect that `checks` does not allow to be dropped; the message names file and line.
    """
    checks = checks or TaskChecks()
    notes: list[str] = []
    clean = {split: [checked_example(e, name) for e in examples] for split, examples in splits.items()}
    if not any(clean.values()):
        raise TaskError(f"task {name!r} holds no example")
    _check_duplicates(name, clean, checks, notes)
    return finished_task(
        Task(name, (), {split: HeldExamples(e) for split, e in clean.items()}, descriptions or {}, description,
             oos_label, tuple(notes)),
        Counter(e.label for e in clean[next(iter(clean))]),
        {e.label: e.source for examples in clean.values() for e in examples},
        checks,
    )  # fmt: skip


def finished_task(task: Task, counts: Mapping[str, int], last: Mapping[str, str], checks: TaskChecks) -> Task:
    """Give a task its labels, without those that are too rare.

    Args:
        task: the task, whose labels are not known yet.
        counts: how many examples of each label the first split has.
        last: where the last example of each label of any split was read.
        checks: what to do about defects.

    Raises:
        TaskError: a label is too rare, and `checks` does not allow to drop it; or fewer than two labels are left.
    """
    every = set(last) - {task.oos_label}
    rare = sorted(label for label in every if counts.get(label, 0) < checks.min_examples)
    if rare and checks.rare_labels == "error":
        raise TaskError(
            f"{last[rare[0]] or task.name}: label {rare[0]!r} has {counts.get(rare[0], 0)} example(s) in split "
            f"{next(iter(task.splits))!r}, fewer than {checks.min_examples} ({len(rare)} such labels); add examples, "
            "or set rare_labels: drop"
        )
    if rare:
        note = f"dropped {len(rare)} labels with fewer than {checks.min_examples} examples: {', '.join(rare)}"
        gone = set(rare)
        task = replace(task, splits=task._keeping(lambda label: label not in gone), notes=(*task.notes, note))
    labels = sorted(every.difference(rare))
    if len(labels) < 2:
        raise TaskError(f"task {task.name!r} has {len(labels)} label(s) left; a classification task needs two or more")
    known = set(labels)
    described = {k: v for k, v in task.descriptions.items() if k in known and v}
    return replace(task, labels=tuple(labels), descriptions=described)


def duplicate_error(name: str, split: str, source: str, first_split: str, first_source: str) -> TaskError:
    """Return the error that says that a text of `split` stands in `first_split` too."""
    return TaskError(
        f"{source or name}: this text of split {split!r} stands in split {first_split!r} too"
        f" ({first_source or name}); remove it, or set duplicates: drop"
    )


def checked_example(example: Example, task: str) -> Example:
    """Return an example without space around its text and label.

    Raises:
        TaskError: one of them is empty.
    """
    place = example.source or f"task {task!r}"
    if not example.text.strip():
        raise TaskError(f"{place}: the text is empty; remove the row or fill it in")
    if not example.label.strip():
        raise TaskError(f"{place}: the label is empty; remove the row or fill it in")
    return Example(example.text.strip(), example.label.strip(), example.source)


def _check_duplicates(name: str, splits: dict[str, list[Example]], checks: TaskChecks, notes: list[str]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for split, examples in splits.items():
        kept = []
        for example in examples:
            first_split, first_source = seen.setdefault(example.text, (split, example.source))
            if first_split == split:
                kept.append(example)
            elif checks.duplicates == "error":
                raise duplicate_error(name, split, example.source, first_split, first_source)
        if len(kept) < len(examples):
            notes.append(dropped_note(len(examples) - len(kept), split))
        splits[split] = kept


def dropped_note(count: int, split: str) -> str:
    """Return the note on texts of `split` that were dropped as duplicates."""
    return f"dropped {count} texts of {split!r} that an earlier split holds"
