"""Streams texts through a model or classifier: texts in, JSON lines out, in constant memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from icl_markup.episodes import Episode, Query
from icl_markup.errors import MarkupError, PromptError
from icl_markup.model import MarkupModel
from icl_markup.priors import PriorChoice
from icl_markup.rows import KINDS, rows_of
from icl_markup.text import is_encodable

if TYPE_CHECKING:
    from icl_markup.classifier import MarkupClassifier

Answer = dict[str, Any]
Ask = Callable[[list[str]], list[Answer]]
"""A function from texts to one answer each, in order: the label, probabilities, and what else is worth saying."""

CHUNK = 256
"""Texts that are batched together; the memory a stream needs does not depend on its length."""


class Text(NamedTuple):
    """A text and where it stands (``argument 1``, ``file:3``), or why there is none in that place."""

    place: str
    text: str
    error: str | None = None


class Line(NamedTuple):
    """A line of output, and whether it is an error's."""

    json: str
    failed: bool


@contextmanager
def open_texts(texts: Sequence[str], file: str | None, column: str = "text") -> Iterator[Iterator[Text]]:
    """Open texts given as arguments, in a file, or on standard input.

    A .jsonl, .csv, .tsv or .parquet file has its texts in a column; any other has one a line, and blank lines are
    passed over.

    Raises:
        PromptError: both arguments and a file are given, or the file cannot be read.
        TaskError: a row is malformed, or has no text in that column.
    """
    if texts and file:
        raise PromptError("give texts either as arguments or with --file, not both")
    if texts:
        yield (Text(f"argument {i}", text) for i, text in enumerate(texts, start=1))
        return
    if file in (None, "-"):
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        yield _numbered("standard input", sys.stdin)
        return
    path = Path(str(file))
    try:
        lines = path.open(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from error
    with lines:
        if path.suffix.lower() in KINDS:
            yield _column(path, column)
        else:
            yield _numbered(str(file), lines)


def predict_lines(ask: Ask, texts: Iterable[Text], *, keep_errors: bool = False) -> Iterator[Line]:
    """Classify texts in order and yield a JSON line each: text, label, probabilities.

    Args:
        ask: answers texts.
        texts: the texts.
        keep_errors: a text that cannot be classified has a line with its error, instead of ending the stream.

    Raises:
        MarkupError: a text is empty, or does not fit; the message names its place. Lines before it were yielded.
    """
    source = _Chunks(iter(texts))
    for chunk in source:
        try:
            if any(one.error for one in chunk):
                raise PromptError("one of the texts is none")
            answers = ask([one.text for one in chunk])
        except MarkupError:
            # One text spoils a batch: answer one by one, and name the place of what cannot be.
            for one in chunk:
                try:
                    if one.error:
                        raise PromptError(one.error)
                    [answer] = ask([one.text])
                except MarkupError as error:
                    if not keep_errors:
                        raise PromptError(f"{one.place}: {error}") from error
                    yield Line(_json({"text": one.text, "error": f"{one.place}: {error}"}), True)
                else:
                    yield Line(_json({"text": one.text, **answer}), False)
        else:
            for one, answer in zip(chunk, answers, strict=True):
                yield Line(_json({"text": one.text, **answer}), False)
        if source.error is not None:
            raise source.error


class _Chunks:
    """Texts in chunks; an error of their source waits until the texts before it are answered."""

    def __init__(self, texts: Iterator[Text]):
        self.texts = texts
        self.error: MarkupError | None = None

    def __iter__(self) -> Iterator[list[Text]]:
        while self.error is None:
            chunk: list[Text] = []
            try:
                chunk.extend(islice(self.texts, CHUNK))
            except MarkupError as error:
                self.error = error
            if not chunk and self.error is not None:
                raise self.error
            if not chunk:
                return
            yield chunk


def ask_model(
    model: MarkupModel, episode: Episode, batch_tokens: int, top: int | None = None, calibration: PriorChoice = "auto"
) -> Ask:
    """Return a function that asks a model with one episode's options and demonstrations.

    Args:
        model: the model.
        episode: options and demonstrations; its queries are ignored.
        batch_tokens: the most tokens of one forward pass, padding included.
        top: give the probabilities of so many labels, the largest first; None: of all, in their order.
        calibration: how the prior of the labels is found, which is divided out (`icl_markup.priors`); ``auto``: as the
            model has it.
    """

    def ask(texts: list[str]) -> list[Answer]:
        for text in texts:
            if not text.strip():
                raise PromptError("the text is empty")
        answers = []
        asked = replace(episode, queries=tuple(map(Query, texts)))
        for found in model.predictions(asked, batch_tokens, calibration):
            answer: Answer = {"label": found.label, "probabilities": largest(found.probabilities, top)}
            if found.shortened or found.dropped:
                answer |= {"shortened_demonstrations": found.shortened, "dropped_demonstrations": found.dropped}
            answers.append(answer)
        return answers

    return ask


def ask_classifier(classifier: MarkupClassifier, top: int | None = None) -> Ask:
    """Return a function that asks a fitted classifier; `top` as in `ask_model`."""
    classes = classifier.classes_.tolist()

    def ask(texts: list[str]) -> list[Answer]:
        answers = []
        for row in classifier.predict_proba(texts):
            probabilities = dict(zip(map(str, classes), row.tolist(), strict=True))
            answers.append({"label": classes[int(row.argmax())], "probabilities": largest(probabilities, top)})
        return answers

    return ask


def largest(probabilities: dict[str, float], top: int | None) -> dict[str, float]:
    """Return so many of the probabilities, the largest first; None: all, in their order."""
    if top is None:
        return probabilities
    return dict(sorted(probabilities.items(), key=lambda item: -item[1])[:top])


def _json(line: Answer) -> str:
    """Write a line; where a text is none (half of a surrogate pair), with escapes, since UTF-8 cannot hold it."""
    plain = json.dumps(line, ensure_ascii=False)
    return plain if is_encodable(plain) else json.dumps(line)


def beginning(text: str) -> str:
    """Return how the line that answers a text begins."""
    return _json({"text": text})[:-1]


def _numbered(name: str, lines: Iterable[str]) -> Iterator[Text]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        if is_encodable(line):
            yield Text(place, line.strip())
        else:  # bytes that are no text were let through as halves of surrogate pairs: the lines around can be answered
            shown = line.strip().encode(errors="surrogateescape").decode(errors="replace")
            yield Text(place, shown, "not UTF-8 text; save it as UTF-8")


def _column(path: Path, column: str) -> Iterator[Text]:
    for number, row in rows_of(path):
        text = row.get(column)
        if not isinstance(text, str):
            found = ", ".join(map(repr, row)) or "nothing"
            reason = "is no text" if column in row else f"is missing; the row has {found}"
            yield Text(f"{path}:{number}", "", f"column {column!r} {reason}; set --text-column")
        else:
            yield Text(f"{path}:{number}", text)
