"""From files of examples to a classifier's folder: what ``icl-markup fit`` does."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icl_markup.classifier import MarkupClassifier
from icl_markup.classifier_file import check_place
from icl_markup.errors import ConfigError, TaskError
from icl_markup.readers import TaskSource, example_of, read_task
from icl_markup.rows import rows_of
from icl_markup.serving import chat_of
from icl_markup.tasks import NONE_OF_THE_ABOVE, Example, TaskChecks


def fit_files(args: argparse.Namespace) -> Iterator[str]:
    """Fit, calibrate and save a classifier; yield lines that say what came of it.

    Raises:
        MarkupError: a file cannot be read, a text or label cannot be used, or the folder cannot be written.
    """
    if args.shots is not None and args.shots < 1:
        raise ConfigError(f"--shots {args.shots}: give a number of at least 1")
    check_place(args.out)
    examples, validation, descriptions = _examples(args)
    if args.validation:
        validation = list(_rows(Path(args.validation), args, None))
    if args.calibration == "batch" and not validation:
        raise ConfigError("--calibration batch learns from texts that are no examples; give them with --validation")
    classifier = MarkupClassifier(
        _pinned(args.tags, args.revision),
        backbone=_found(args.backbone),
        chat=chat_of(args),
        descriptions=descriptions or None,
        none_of_the_above=args.none_of_the_above,
        calibration=args.calibration,
        retriever=args.retriever,
        n_permutations=args.permutations,
        cache_bytes=args.cache_mib * 2**20,
        **({} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}),
        device=args.device,
        quantisation=args.quantisation,
    )
    classifier.fit([e.text for e in examples], [e.label for e in examples])
    yield f"labels: {len(classifier.labels())}, examples: {len(examples)}"
    if validation:
        texts, labels = [e.text for e in validation], [e.label for e in validation]
        if not args.none_of_the_above:
            kept = [i for i, label in enumerate(labels) if label != NONE_OF_THE_ABOVE]
            texts, labels = [texts[i] for i in kept], [labels[i] for i in kept]
        classifier.calibrate(texts, labels)
        found = classifier.calibration_
        yield f"calibrated on {len(texts)} texts: temperature {found.temperature:.3f}, threshold {found.threshold}"
        yield f"recall of the retriever on them: {classifier.retriever_recall(texts, labels):.3f}"
    yield f"classifier: {classifier.save(args.out)}"


def _pinned(tags: str | None, revision: str | None) -> str | None:
    if revision is None:
        return tags
    if tags is None:
        raise ConfigError("--revision is that of --tags; give --tags, or leave it away")
    return f"{tags}@{revision}"


def _found(backbone: str | None) -> str | None:
    """Return a folder's whole path, by which the classifier finds it from anywhere; a hub name as it is."""
    return str(Path(backbone).resolve()) if backbone and Path(backbone).is_dir() else backbone


def _examples(args: argparse.Namespace) -> tuple[list[Example], list[Example], dict[str, str]]:
    """Return demonstrations, validation texts and descriptions; a file has the first alone."""
    path = Path(args.examples)
    if path.is_file():
        return list(_rows(path, args, args.shots)), [], {}
    source = TaskSource(
        args.examples,
        text_column=args.text_column,
        label_column=args.label_column,
        checks=TaskChecks(duplicates="drop"),
    )
    task = read_task(source)
    first = next(iter(task.splits))
    usable = (e for e in task.split(first) if e.label != task.oos_label)
    held = [
        e._replace(label=NONE_OF_THE_ABOVE) if e.label == task.oos_label else e
        for e in (task.split("validation") if "validation" in task.splits and first != "validation" else [])
    ]
    return list(_first(usable, args.shots)), held, dict(task.descriptions)


def _rows(path: Path, args: argparse.Namespace, shots: int | None) -> Iterator[Example]:
    source = TaskSource(str(path), text_column=args.text_column, label_column=args.label_column)
    rows = tqdm(rows_of(path), desc=f"reading {path.name}", unit="row", disable=None)
    found = False
    for example in _first((_labelled(row, f"{path}:{line}", source) for line, row in rows), shots):
        found = True
        yield example
    if not found:
        raise TaskError(f"{path}: no examples; give a text and a label a row")


def _labelled(row: Mapping[str, Any], place: str, source: TaskSource) -> Example:
    """Read an example whose label is kept as it is written: answers bring it back."""
    example = example_of(row, place, source)
    label = row[source.label_column]
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise TaskError(f"{place}: the label is {label!r}; give a string or a whole number")
    if not str(label).strip():
        raise TaskError(f"{place}: the label is empty; remove the row or fill it in")
    return example._replace(label=str(label).strip())


def _first(examples: Iterator[Example], shots: int | None) -> Iterator[Example]:
    """Yield the first so many examples of each label, each text once."""
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for example in examples:
        key = (example.text, example.label)
        if (shots is not None and counts[example.label] >= shots) or key in seen:
            continue
        counts[example.label] += 1
        seen.add(key)
        yield example
