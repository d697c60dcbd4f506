"""Lines of output that survive an interruption: a run that is started again goes on after the last whole line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

from icl_markup.errors import PromptError
from icl_markup.predict import Text, beginning


class Resumed(NamedTuple):
    """An output to go on with, the texts that are left, and how many of the lines there are errors."""

    out: TextIO
    texts: Iterator[Text]
    failed: int


class _Found(NamedTuple):
    """What a file holds: whole lines, the text of the last, where they end, the rest, and how many are errors."""

    done: int = 0
    last: str | None = None
    end: int = 0
    rest: bytes = b""
    failed: int = 0


@contextmanager
def resumed(path: str | Path, texts: Iterator[Text]) -> Iterator[Resumed]:
    """Open a file to append answers to, and pass over the texts that it answers already.

    A last line that was cut short is removed. Before that it is checked that the answers belong to these texts, on the
    last whole line, and that what was cut short is the beginning of the next text's answer.

    Args:
        path: the file; it need not exist.
        texts: the texts; those that have an answer are passed over.

    Raises:
        PromptError: the file cannot be written, or it holds something else than answers to these texts; it is then as
            it was.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise PromptError(f"{path}: is not a regular file; leave --out away to write to standard output")
        found = _answered(path)
        _skip(texts, found.done, found.last, path)
        texts = _checked_next(texts, found.rest, path)
        out = path.open("r+" if path.exists() else "w", encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path}: cannot be written: {error.strerror}") from error
    with out:
        out.truncate(found.end)
        out.seek(0, os.SEEK_END)
        yield Resumed(out, texts, found.failed)


def _answered(path: Path) -> _Found:
    found = _Found()
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return found._replace(rest=line)
            try:
                row = json.loads(line)
                text, failed = row["text"], "error" in row
            except (ValueError, KeyError, TypeError) as error:
                raise PromptError(f"{path}:{number}: not an answer of this command; choose another file") from error
            found = _Found(number, str(text), found.end + len(line), b"", found.failed + failed)
    return found


def _checked_next(texts: Iterator[Text], rest: bytes, path: Path) -> Iterator[Text]:
    """Check that what was cut short is how the answer to the next text begins."""
    if not rest:
        return texts
    one = next(texts, None)
    begin = b"" if one is None else beginning(one.text).encode()
    length = min(len(begin), len(rest))
    if one is None or begin[:length] != rest[:length]:
        raise PromptError(f"{path}: ends in something that is no answer of this command; choose another file")
    return chain([one], texts)


def _skip(texts: Iterable[Text], done: int, last: str | None, path: Path) -> None:
    if not done:
        return
    one = None
    for number, one in enumerate(texts, start=1):  # noqa: B007
        if number == done:
            break
    else:
        number = 0 if one is None else number
        raise PromptError(f"{path}: holds {done} answers, but there are {number} texts; choose another file")
    if one is not None and one.text != last:
        raise PromptError(
            f"{path}:{done}: answers {str(last)[:40]!r}, but the text at {one.place} is {one.text[:40]!r}; "
            "choose another file, or give the texts it was begun with"
        )
