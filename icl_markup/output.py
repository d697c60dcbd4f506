"""Lines of output that survive an interruption: a run that is started again goes on after the last whole line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from icl_markup.errors import PromptError
from icl_markup.predict import Text


@contextmanager
def resumed(path: str | Path, texts: Iterator[Text]) -> Iterator[TextIO]:
    """Open a file to append answers to, and pass over the texts that it answers already.

    A last line that was cut short is removed. Whether the answers belong to these texts is checked on the last of them.

    Args:
        path: the file; it need not exist.
        texts: the texts; on return the next one is the first without an answer.

    Raises:
        PromptError: the file cannot be written, or its last answer is not that of the text in its place.
    """
    path = Path(path)
    try:
        done, last, end = _answered(path)
        out = path.open("r+" if path.exists() else "w", encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path}: cannot be written: {error.strerror}") from error
    with out:
        out.truncate(end)
        out.seek(0, os.SEEK_END)
        _skip(texts, done, last, path)
        yield out


def _answered(path: Path) -> tuple[int, str | None, int]:
    """Return how many whole lines a file has, the text of the last, and where they end."""
    if not path.exists():
        return 0, None, 0
    count, end, last = 0, 0, b""
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            count, end, last = count + 1, end + len(line), line
    if not count:
        return 0, None, 0
    try:
        return count, str(json.loads(last)["text"]), end
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{path}:{count}: not an answer of this command; choose another file") from error


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
