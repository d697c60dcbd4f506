"""Files that are written whole or not at all, and JSON that carries a checksum of its own content."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from icl_markup.errors import MarkupError, TagFileError

_SEAL = "sha256"
MOST_DETAILS = 2**30
"""A JSON file of more bytes than this is not read."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, replacing the one that is there; a reader finds the old content or the new, whatever happens.

    Raises:
        OSError: it cannot be written; the error names the file, whose old content is intact.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def append_line(path: Path, line: str) -> None:
    """Write a line, without its end, at the end of a file.

    Raises:
        OSError: it cannot be written; the error names the file, which may end in a part of the line.
    """
    try:
        with path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def reported(kind: type[MarkupError], path: Path, remedy: str) -> Iterator[None]:
    """Turn an error of the file system into a `MarkupError` that names the file, else `path`, and the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path}: cannot be written: {error.strerror or error}; {remedy}") from error


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, by their paths in it, into a new folder beside `folder`, then put it in its place."""
    with new_folder(folder) as part:
        for name, content in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            with (part / name).open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; after the block it takes that one's place, after an error it is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if not folder.exists():
            part.rename(folder)
        elif not _exchanged(part, folder):
            _step_aside(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchanged(part: Path, folder: Path) -> bool:
    """Swap two folders in one call, so that there is one in that place at any moment; False where it can't be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # a system other than Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(part), here, os.fsencode(folder), exchange) == 0)


def _step_aside(part: Path, folder: Path) -> None:
    """Move the old folder away and the new one in its place; if that fails, the old one comes back."""
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", suffix=".part", dir=folder.parent))
    folder.rename(old / "was")
    try:
        part.rename(folder)
    except BaseException:
        (old / "was").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*", older: float = 0.0) -> None:
    """Remove what writers that were killed left in `folder`: parts of files and folders of that name.

    Args:
        folder: where they are.
        name: the name of what was written; wildcards as in `Path.glob`.
        older: spare what was changed in the last so many seconds, where others may be writing.
    """
    for path in folder.glob(f".{name}.*.part"):
        try:
            if time.time() - path.stat().st_mtime < older:
                continue
        except FileNotFoundError:  # its writer has finished
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_regular(path: Path, most: int) -> bytes:
    """Read a file that may come from a stranger: it may be a link, but neither a device nor a pipe, nor too large.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than `most` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"has {found.st_size:,} bytes, more than the {most:,} that are read", str(path))
    return path.read_bytes()


def sealed(details: dict[str, Any], plain: Callable[[Any], Any] | None = None) -> bytes:
    """Return JSON with a checksum of its content, by which `read_details` notices damage.

    Args:
        details: the content.
        plain: makes data of a value that JSON does not know.

    Raises:
        TypeError: a value cannot be written as data.
    """
    told = json.loads(json.dumps(details, default=plain))
    text = json.dumps({**told, _SEAL: _digest(told)}, indent=1, ensure_ascii=False)
    return (text + "\n").encode()


def read_details(path: Path, versions: Collection[int], what: str) -> dict[str, Any]:
    """Read what `sealed` made, or such a file without a checksum, as were written before there was one.

    Args:
        path: the file.
        versions: the formats that are understood.
        what: the kind of folder that the file makes, for messages.

    Raises:
        TagFileError: the file is missing, damaged or of another format.
    """
    try:
        details = json.loads(read_regular(path, MOST_DETAILS).decode())
    except OSError as error:
        raise TagFileError(f"{path}: cannot be read: {error.strerror}; is this a {what} folder?") from error
    except (ValueError, RecursionError) as error:
        raise TagFileError(f"{path}: damaged: not valid JSON ({error})") from error
    if not isinstance(details, dict) or "format" not in details:
        raise TagFileError(f"{path}: damaged: no format version")
    if details["format"] not in versions:
        known = f"format{'s' * (len(versions) > 1)} {' and '.join(map(str, versions))}"
        raise TagFileError(f"{path}: format {details['format']!r}; this version reads {known}")
    seal = details.pop(_SEAL, None)
    if seal is not None and seal != _digest(details):
        raise TagFileError(
            f"{path}: damaged: its content differs from its checksum; if it was edited on purpose, remove its key "
            f"{_SEAL!r}"
        )
    return details


def _digest(details: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(details, sort_keys=True).encode()).hexdigest()
