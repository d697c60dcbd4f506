"""The user's cache: what costs time to make is made once, whole or not at all, and found again by its checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from icl_markup.errors import BackboneError, MarkupError
from icl_markup.files import new_folder, read_regular, remove_leftovers, write_whole

VARIABLE = "ICL_MARKUP_CACHE"
"""The environment variable that names another folder for the cache."""

MARKER = "made.json"
"""The file that is written last into a folder: the sizes of the other ones by their names."""

_MOST_NOTE = 2**16
_BLOCK = 2**22
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust end their messages about an error of the system."""


def cache_folder() -> Path:
    """Return the cache's folder: ``$ICL_MARKUP_CACHE``, ``$XDG_CACHE_HOME/icl-markup`` or ``~/.cache/icl-markup``."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "icl-markup"
    home = os.path.expanduser("~")  # noqa: PTH111  (where there is no home, Path raises)
    return Path(home).absolute() / ".cache" / "icl-markup"


def made_once(place: Path, make: Callable[[Path], None], is_right: Callable[[Path], bool] | None = None) -> Path:
    """Return a folder of the cache, which is made if it is not there, or no longer whole.

    Of several processes that need it one makes it, and the others wait. A process that is killed while it makes the
    folder, or while it removes it, leaves nothing that is taken for it.

    Args:
        place: the folder.
        make: writes its content into an empty folder that it is given; an error of it leaves nothing behind.
        is_right: looks closer at a folder that is whole; if it returns False, the folder is made again.

    Raises:
        BackboneError: the folder cannot be written.
    """

    def stands() -> bool:
        return is_whole(place) and (is_right is None or is_right(place))

    try:
        if stands():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if not stands():
                remove_leftovers(place.parent, place.name)
                with new_folder(place) as part, _system_errors(part, place):
                    make(part)
                    sizes = _flush(part)
                    write_whole(part / MARKER, json.dumps({"sizes": sizes}).encode())
    except OSError as error:
        raise BackboneError(
            f"{error.filename or place}: the cache cannot be written: {error.strerror or error}; make room, or set "
            f"{VARIABLE} to another folder"
        ) from error
    return place


def is_whole(place: Path) -> bool:
    """Return whether the cache has a folder with every file that was written into it, of the size that it had."""
    try:
        sizes = json.loads(read_regular(place / MARKER, _MOST_NOTE))["sizes"]
        return bool(sizes) and all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # something is missing, or an earlier version wrote no marker


def checksum_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits.

    It is noted in the cache with the file's size and time of change, so that a large file is read once.

    Raises:
        OSError: the file cannot be read.
    """
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns, state.st_ino]
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    note = cache_folder() / "checksums" / f"{key}.json"
    try:
        known = json.loads(read_regular(note, _MOST_NOTE))
        if known["file"] == seen:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing noted, or nothing that can be used
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"file": seen, "sha256": digest.hexdigest()}).encode())
    except OSError:
        pass  # it is computed again next time
    return digest.hexdigest()


@contextmanager
def _system_errors(part: Path, place: Path) -> Iterator[None]:
    """Turn errors of the system into `OSError`, whoever raises them; those about files of `part` name `place`."""
    try:
        yield
    except MarkupError:
        raise
    except OSError as error:
        is_inside = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(part)
        if error.errno is None or not is_inside:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error
    except Exception as error:  # safetensors has a class of its own for a full disk, tokenizers a plain Exception
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(place)) from error


def _flush(folder: Path) -> dict[str, int]:
    """Have the system write a folder's files to the disk before the folder takes its place; return their sizes."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # as other files are; some writers keep theirs to themselves
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes
