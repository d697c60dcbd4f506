"""One run an output: a lock that the operating system releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from icl_markup.errors import MarkupError


@contextmanager
def only_run(output: Path, error: type[MarkupError], *, folder: bool = False) -> Iterator[None]:
    """Hold the lock of an output while the block runs.

    The lock is a file, ``.lock`` in a folder (which is made) and ``.NAME.lock`` beside a file; it is gone afterwards.

    Args:
        output: what is written.
        error: what is raised.
        folder: whether the output is a folder.

    Raises:
        MarkupError: of the class `error`: another run writes there, or no file can be made there.
    """
    real = output.resolve()  # however it is called
    path = real / ".lock" if folder else real.with_name(f".{real.name}.lock")
    lock = FileLock(path, blocking=False)
    try:
        if folder:
            output.mkdir(parents=True, exist_ok=True)
        elif not real.parent.is_dir():  # which the lock would make
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(output.parent))
        lock.acquire()
    except Timeout as held:
        raise error(
            f"{output}: {_holder(path)} is writing to it; wait for it to end, stop it, or choose another output"
        ) from held
    except OSError as found:
        raise error(f"{output}: cannot be written: {found.strerror or found}") from found
    try:
        with suppress(OSError):  # who holds it is told where there is room; the lock itself needs none
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only keeps the file, which hinders nobody
            path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text())
        return f"another run (process {int(told['pid'])} on {told['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
