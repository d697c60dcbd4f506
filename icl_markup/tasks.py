"""A task: labelled texts with readable label names, and the checks that make it fit for episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from icl_markup.errors import TaskError

NONE_OF_THE_ABOVE = "none of the above"
"""The option, and the answer, that a text has which fits none of the labels."""


class Example(NamedTuple):
    """One labelled text and where it was read, as ``file:line`` (empty where it was made in memory)."""

    text: str
    label: str
    source: str = ""


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
    splits: Mapping[str, tuple[Example, ...]]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    oos_label: str | None = None
    notes: tuple[str, ...] = ()

    def by_label(self, split: str) -> dict[str, list[str]]:
        """Return the texts of `split` by label name; labels without a text are absent, and so is out-of-scope.

        Raises:
            TaskError: the task has no such split.
        """
        texts: dict[str, list[str]] = {}
        for example in self.split(split):
            if example.label != self.oos_label:
                texts.setdefault(example.label, []).append(example.text)
        return texts

    def out_of_scope(self, split: str) -> list[str]:
        """Return the out-of-scope texts of `split`."""
        return [e.text for e in self.split(split) if self.oos_label is not None and e.label == self.oos_label]

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of a split.

        Raises:
            TaskError: the task has no such split.
        """
        if name not in self.splits:
            raise TaskError(f"task {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def without_oos(self) -> Task:
        """Return the task without its out-of-scope texts."""
        splits = {s: tuple(e for e in examples if e.label != self.oos_label) for s, examples in self.splits.items()}
        return replace(self, splits=splits, oos_label=None)

    def only_labels(self, labels: Iterable[str], name: str | None = None) -> Task:
        """Return the task restricted to `labels` (out-of-scope examples stay), under another name if given.

        Raises:
            TaskError: a label is not one of the task's.
        """
        keep = set(labels)
        unknown = keep - set(self.labels)
        if unknown:
            raise TaskError(f"task {self.name!r} has no label {sorted(unknown)[0]!r}")
        return Task(
            name=name or self.name,
            labels=tuple(label for label in self.labels if label in keep),
            splits={
                split: tuple(e for e in examples if e.label in keep or e.label == self.oos_label)
                for split, examples in self.splits.items()
            },
            descriptions={k: v for k, v in self.descriptions.items() if k in keep},
            description=self.description,
            oos_label=self.oos_label,
            notes=self.notes,
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
    clean = {split: [_checked_example(e, name) for e in examples] for split, examples in splits.items()}
    if not any(clean.values()):
        raise TaskError(f"task {name!r} holds no example")
    _check_duplicates(name, clean, checks, notes)
    rare = _rare_labels(name, clean, oos_label, checks)
    if rare:
        notes.append(f"dropped {len(rare)} labels with fewer than {checks.min_examples} examples: {', '.join(rare)}")
        clean = {s: [e for e in examples if e.label not in rare] for s, examples in clean.items()}
    labels = sorted({e.label for examples in clean.values() for e in examples} - {oos_label})
    if len(labels) < 2:
        raise TaskError(f"task {name!r} has {len(labels)} label(s) left; a classification task needs two or more")
    return Task(
        name=name,
        labels=tuple(labels),  # type: ignore[arg-type]
        splits={split: tuple(examples) for split, examples in clean.items()},
        descriptions={k: v for k, v in (descriptions or {}).items() if k in labels and v},
        description=description,
        oos_label=oos_label,
        notes=tuple(notes),
    )


def _checked_example(example: Example, task: str) -> Example:
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
                raise TaskError(
                    f"{example.source or name}: this text of split {split!r} stands in split {first_split!r} too"
                    f" ({first_source or name}); remove it, or set duplicates: drop"
                )
        if len(kept) < len(examples):
            notes.append(f"dropped {len(examples) - len(kept)} texts of {split!r} that an earlier split holds")
        splits[split] = kept


def _rare_labels(name: str, splits: dict[str, list[Example]], oos_label: str | None, checks: TaskChecks) -> list[str]:
    first = next(iter(splits))
    counts = Counter(e.label for e in splits[first])
    every = {e.label: e.source for examples in splits.values() for e in examples if e.label != oos_label}
    rare = sorted(label for label in every if counts[label] < checks.min_examples)
    if rare and checks.rare_labels == "error":
        raise TaskError(
            f"{every[rare[0]] or name}: label {rare[0]!r} has {counts[rare[0]]} example(s) in split {first!r}, fewer "
            f"than {checks.min_examples} ({len(rare)} such labels); add examples, or set rare_labels: drop"
        )
    return rare
