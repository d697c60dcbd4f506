"""Lines of output that survive an interruption: a run that is started again goes on after the last whole line.

What shares a batch with a text moves its probabilities by rounding. So that the bytes are those of a run that was not
interrupted, a resumed run asks the whole chunk again in which the last line lies; that these answers are the ones in
the file also shows that nothing else was changed that they depend on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from icl_markup.errors import PromptError
from icl_markup.files import reported
from icl_markup.lock import only_run
from icl_markup.predict import CHUNK, Line, Text, beginning

_GO_ON = "the answers before are intact; make room, then run the same command"
_ROUNDING = 1e-3
"""Probabilities of another machine, or of other threads, differ by less than this."""


@dataclass(frozen=True)
class Resumed:
    """An output to go on with.

    Attributes:
        path: the file.
        out: the same, open at its end.
        texts: the texts that are to be asked: those of the last chunk, and those that are left.
        again: the lines that answer the first of these texts already.
        before: the number of lines before those.
        failed: how many of the lines there are errors.
    """

    path: Path
    out: TextIO
    texts: Iterator[Text]
    again: list[dict[str, Any]]
    before: int
    failed: int

    def write(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Write the lines that are not there yet, and yield them.

        Args:
            lines: the answers to `texts`, in order.

        Raises:
            PromptError: an answer is not the one that is in the file, or the file cannot be written; what is there
                stays.
        """
        known = iter(enumerate(self.again, start=self.before + 1))
        for line in lines:
            number, old = next(known, (0, None))
            if old is not None:
                if not _same(old, json.loads(line.json)):
                    raise PromptError(
                        f"{self.path}:{number}: holds another answer to {str(old['text'])[:40]!r} than this command "
                        "gives: it was begun with another classifier, other labels or another --top; give those, or "
                        "choose another file"
                    )
                continue
            with reported(PromptError, self.path, _GO_ON):
                self.out.write(line.json + "\n")
                self.out.flush()
            yield line


class _Found(NamedTuple):
    """What a file holds: whole lines, those of the last chunk, where they end, the rest, and how many are errors."""

    done: int = 0
    last: tuple[dict[str, Any], ...] = ()
    end: int = 0
    rest: bytes = b""
    failed: int = 0


@contextmanager
def resumed(path: str | Path, texts: Iterator[Text]) -> Iterator[Resumed]:
    """Open a file to append answers to, and pass over the chunks of texts that it answers already.

    A last line that was cut short is removed. Before that it is checked that the answers belong to these texts, on the
    last whole line, and that what was cut short is the beginning of the next text's answer.

    Args:
        path: the file; it need not exist.
        texts: the texts; those of chunks that have answers are passed over.

    Raises:
        PromptError: the file cannot be written, another run is writing to it, or it holds something else than answers
            to these texts; it is then as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise PromptError(f"{path}: is not a regular file; leave --out away to write to standard output")
    with only_run(path, PromptError):
        try:
            found = _answered(path)
            chunk, texts = _skip(texts, found.done, found.last[-1]["text"] if found.last else None, path)
            texts = chain(chunk, _checked_next(texts, found.rest, path))
            out = path.open("r+" if path.exists() else "w", encoding="utf-8")
        except OSError as error:
            raise PromptError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            out.truncate(found.end)
            out.seek(0, os.SEEK_END)
            again = list(found.last)
            yield Resumed(path, out, texts, again, found.done - len(again), found.failed)
        except BaseException:
            with suppress(OSError):  # a line that could not be written was reported, and closing tries it again
                out.close()
            raise
        with reported(PromptError, path, _GO_ON):
            out.close()


def _answered(path: Path) -> _Found:
    found = _Found()
    if not path.exists():
        return found
    last: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                found = found._replace(rest=line)
                break
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError("its text is none")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise PromptError(f"{path}:{number}: not an answer of this command; choose another file") from error
            if number % CHUNK == 1:
                last.clear()
            last.append(row)
            found = _Found(number, (), found.end + len(line), b"", found.failed + ("error" in row))
    return found._replace(last=tuple(last))


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


def _skip(texts: Iterator[Text], done: int, last: str | None, path: Path) -> tuple[list[Text], Iterator[Text]]:
    """Pass over answered texts; return those of the last chunk, and what is left."""
    chunk: list[Text] = []
    number = 0
    while number < done:
        one = next(texts, None)
        if one is None:
            raise PromptError(f"{path}: holds {done} answers, but there are {number} texts; choose another file")
        if number % CHUNK == 0:
            chunk.clear()
        chunk.append(one)
        number += 1
    if chunk and chunk[-1].text != last:
        raise PromptError(
            f"{path}:{done}: answers {str(last)[:40]!r}, but the text at {chunk[-1].place} is "
            f"{chunk[-1].text[:40]!r}; choose another file, or give the texts it was begun with"
        )
    return chunk, texts


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two lines are one answer, rounding aside."""
    if old["text"] != new["text"] or set(old) != set(new):
        return False
    before, now = old.get("probabilities"), new.get("probabilities")
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "error" in old or (before == now and old.get("label") == new.get("label"))
    # Which label has the larger of two equal probabilities is a matter of rounding.
    return (
        set(before) == set(now)
        and str(old.get("label")) in now
        and all(
            isinstance(value, (int, float)) and math.isclose(value, now[name], rel_tol=0, abs_tol=_ROUNDING)
            for name, value in before.items()
        )
    )
