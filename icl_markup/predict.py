"""Streams texts through a model: lines in, JSONL out, in constant memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from icl_markup.episodes import Episode, Query
from icl_markup.errors import PromptError
from icl_markup.model import MarkupModel, Prediction

_CHUNK = 256
"""Texts that are batched together; the memory a stream needs does not depend on its length."""


@contextmanager
def open_texts(texts: Sequence[str], file: str | None) -> Iterator[Iterable[tuple[str, str]]]:
    """Open texts given as arguments, in a file (a text a line), or on standard input.

    Yields pairs of a place (``argument 1``, ``file:3``) and a text; blank lines of a file are passed over.

    Raises:
        PromptError: both arguments and a file are given, or the file cannot be read.
    """
    if texts and file:
        raise PromptError("give texts either as arguments or with --file, not both")
    if texts:
        yield ((f"argument {i}", text) for i, text in enumerate(texts, start=1))
        return
    if file in (None, "-"):
        yield _numbered("standard input", sys.stdin)
        return
    try:
        lines = Path(str(file)).open(encoding="utf-8")  # noqa: SIM115 (closed below; errors of the body are its own)
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from error
    with lines:
        yield _numbered(str(file), lines)


def predict_lines(
    model: MarkupModel, episode: Episode, texts: Iterable[tuple[str, str]], batch_tokens: int
) -> Iterator[str]:
    """Classify texts in order and yield a JSON line each: text, label, probabilities.

    Args:
        model: the model.
        episode: options and demonstrations; its queries are ignored.
        texts: pairs of place and text.
        batch_tokens: the most tokens of one forward pass, padding included.

    Raises:
        PromptError: a text is empty, or does not fit; the message names its place. Lines before it were yielded.
    """
    source = iter(texts)
    while chunk := list(islice(source, _CHUNK)):
        asked = replace(episode, queries=tuple(Query(text) for _, text in chunk))
        try:
            answers = model.predictions(asked, batch_tokens)
        except PromptError:
            # One text spoils a batch: answer what stands before it, and name its place.
            for place, text in chunk:
                if not text.strip():
                    raise PromptError(f"{place}: the text is empty") from None
                try:
                    [answer] = model.predictions(replace(episode, queries=(Query(text),)), batch_tokens)
                except PromptError as error:
                    raise PromptError(f"{place}: {error}") from error
                yield _line(answer)
            raise
        yield from map(_line, answers)


def _line(answer: Prediction) -> str:
    line: dict[str, Any] = {"text": answer.text, "label": answer.label, "probabilities": answer.probabilities}
    if answer.shortened or answer.dropped:
        line |= {"shortened_demonstrations": answer.shortened, "dropped_demonstrations": answer.dropped}
    return json.dumps(line, ensure_ascii=False)


def _numbered(name: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{name}:{number}", line.strip()
    except UnicodeDecodeError as error:
        raise PromptError(f"{name}: not UTF-8 text ({error})") from error
