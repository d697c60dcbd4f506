"""Runs what Markdown pages show, block by block, in the folder that the reader would work in.

What a fenced block is depends on its language, its title and its first line:

- a file, where the title or a first line ``# NAME`` (or ``# NAME: remark``) names one: it is written;
- ``python``: run; the blocks of a page share their names;
- ``console``: a line after ``$ `` is a command, and the lines after it are lines of its output, in their order; the
  command must succeed, or, where the output shows an error of the program, end with exit code 2;
- ``text`` with the title ``Output``: all that the block before it printed;
- ``text`` without a title: a picture, which holds no command.

``…`` stands for anything. A block, or a command, that is not run says why: ``# not run: REASON``, in its first line or
at the end of the command. Every other block is an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from icl_markup.cli import main

ANYTHING = "…"
SMALLER = (
    (r"^make quickstart", "icl-markup quickstart --steps 1 --episodes 1"),
    (
        r"\bicl.markup(\.cli)? warmup \S+\.yaml",
        r"\g<0> --optimiser.steps 2 --optimiser.batch_tokens 500 --optimiser.window 8 --validation.episodes 2",
    ),
)
"""Commands that are run in small: fewer steps, fewer episodes."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`]*)$")
_NAME = re.compile(r"^# (?P<name>[\w./-]+\.\w+)(:.*)?$")
_REASON = re.compile(r"# not run: \S.*")
_SERVE_SECONDS = 120


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language and title, and its lines."""

    place: str
    language: str
    title: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines as a file."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def file(self) -> str | None:
        """The file that the block is, if it is one."""
        named = _NAME.match(self.lines[0]) if self.lines else None
        name = self.title or (named["name"] if named else "")
        return name if re.fullmatch(r"[\w./-]+\.\w+", name) else None

    @property
    def is_excused(self) -> bool:
        """Whether the block says why it is not run."""
        return bool(self.lines) and _REASON.fullmatch(self.lines[0]) is not None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            continue
        inside = []
        for _, other in lines:
            if other.strip() == "```":
                break
            inside.append(other.removeprefix(fence["indent"]))
        language, _, rest = fence["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        found.append(Block(f"{page.name}:{number}", language, title[1] if title else "", tuple(inside)))
    return found


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows into a folder."""
    for block in blocks(page):
        if block.file and not block.is_excused:
            _write(folder, block)


def matches(pattern: str, line: str) -> bool:
    """Return whether a line is what a page shows, where an ellipsis stands for anything."""
    parts = (re.escape(part) for part in pattern.rstrip().split(ANYTHING))
    return re.fullmatch(".*".join(parts), line.rstrip()) is not None


class Reader:
    """Does what a page says.

    Args:
        environment: variables of the commands; those of a command are added for its time.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.server: _Server | None = None
        self.port = 0
        self.printed = ""

    def read(self, page: Path) -> None:
        """Run every block of a page, in order."""
        try:
            for block in blocks(page):
                self.do(block)
        finally:
            self.stop()

    def do(self, block: Block) -> None:
        """Run one block, compare what it shows, or raise AssertionError where it is neither run nor excused."""
        if block.is_excused:
            return
        if block.file:
            _write(Path(), block)
        elif block.language == "python":
            self.printed = self._python(block)
        elif block.language == "console":
            self.printed = self._console(block)
        elif block.language == "text" and block.title == "Output":
            shown, printed = list(block.lines), self.printed.splitlines()
            right = len(shown) == len(printed) and all(map(matches, shown, printed))
            assert right, f"{block.place}: shows\n{block.text}but this was printed:\n{self.printed}"
        else:
            is_picture = block.language == "text" and not block.title
            has_code = any(re.match(r"\s*(\$ |import |from \w+ import )", line) for line in block.lines)
            assert is_picture and not has_code, f"{block.place}: neither run nor excused (# not run: REASON)"

    def stop(self) -> None:
        """End the server, if one runs."""
        if self.server is not None:
            server, self.server = self.server, None
            code = server.stop()
            assert code == 0, f"the server ended with exit code {code}"

    def _python(self, block: Block) -> str:
        # Padded, so that a traceback names the line of the page.
        padding = "\n" * int(block.place.rpartition(":")[2])
        with _captured(split=True) as out:
            exec(compile(padding + block.text, block.place, "exec"), self.names)
        return out.getvalue()

    def _console(self, block: Block) -> str:
        everything = ""
        for command, shown in _commands(block):
            if _REASON.search(command):
                continue
            code, output = self._run(command)
            wanted = 2 if any(line.startswith("icl-markup: ") for line in shown) else 0
            assert code == wanted, f"{block.place}: {command}: exit code {code}, not {wanted}\n{output}"
            rest = iter(output.splitlines())
            for line in shown:
                seen = line.strip() == ANYTHING or any(matches(line, other) for other in rest)
                assert seen, f"{block.place}: {command}: {line!r} is not (there) in the output:\n{output}"
            everything += output
        return everything

    def _run(self, command: str) -> tuple[int, str]:
        for pattern, smaller in SMALLER:
            command = re.sub(pattern, smaller, command)
        command = re.sub(r"(^|\s)\.venv/bin/", r"\1", command)
        words = shlex.split(command, comments=True)
        given = {}
        while words and re.match(r"^[A-Z_]+=", words[0]):
            name, _, given[name] = words.pop(0).partition("=")
        if words[:2] == ["icl-markup", "serve"] and words[-1] == "&":
            return self._serve(words[1:-1], given)
        if words[0] == "kill":
            self.stop()
            return 0, ""
        if words[0] == "icl-markup" and "|" not in words:
            return self._main(words[1:], given)
        done = subprocess.run(
            ["bash", "-c", command.replace("localhost:8000", f"localhost:{self.port}")],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def _main(self, words: list[str], given: dict[str, str]) -> tuple[int, str]:
        """Run the program in this process: starting Python takes longer than most commands."""
        target = None
        if ">" in words:
            target = Path(words[words.index(">") + 1])
            words = words[: words.index(">")]
        with mock.patch.dict(os.environ, given), _captured(split=target is not None) as out:
            try:
                code = main(words)
            except SystemExit as ended:
                code = int(ended.code or 0)
        if target is not None:
            target.write_text(out.getvalue(), encoding="utf-8")
            return code, ""
        return code, out.getvalue()

    def _serve(self, words: Sequence[str], given: dict[str, str]) -> tuple[int, str]:
        """Start the server on a free port, and wait until it listens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with mock.patch.dict(os.environ, given), _captured() as out:
            self.server = _Server([*words, "--port", str(self.port)])
        return self.server.code or 0, out.getvalue().replace(str(self.port), "8000")


class _Server:
    """The command that serves, in a thread: a process of its own would load everything again."""

    def __init__(self, words: Sequence[str]):
        import uvicorn

        self.code: int | None = None
        self._made: list[uvicorn.Server] = []
        self._thread = threading.Thread(target=self._run, args=(words,), daemon=True)
        made, begin = self._made, uvicorn.Server.__init__

        def kept(server: uvicorn.Server, *given: Any) -> None:
            begin(server, *given)
            made.append(server)

        # Signals belong to the main thread, which is another one here.
        self._signals = mock.patch("signal.signal")
        self._signals.start()
        with mock.patch.object(uvicorn.Server, "__init__", kept):
            self._thread.start()
            last = time.monotonic() + _SERVE_SECONDS
            while self._thread.is_alive() and time.monotonic() < last and not (made and made[0].started):
                time.sleep(0.01)

    def stop(self) -> int | None:
        """Let the server end as after SIGTERM; return its exit code."""
        for server in self._made:
            server.should_exit = True
        self._thread.join(_SERVE_SECONDS)
        self._signals.stop()
        return self.code

    def _run(self, words: Sequence[str]) -> None:
        self.code = main(words)


def _commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a console block, each with the output that is shown."""
    command, shown = "", list[str]()
    for line in block.lines:
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        elif command.endswith("\\"):
            command = command[:-1] + line.strip()
        else:
            assert command, f"{block.place}: output before the first command ($ …)"
            shown.append(line)
    assert command, f"{block.place}: no command ($ …)"
    yield command, shown


def _write(folder: Path, block: Block) -> None:
    path = folder / str(block.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


@contextlib.contextmanager
def _captured(split: bool = False) -> Iterator[io.StringIO]:
    """Keep what is printed; with `split`, of the two streams standard output alone."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO() if split else out):
        yield out
