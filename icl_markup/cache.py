"""The user's cache: what costs time to make is made once, whole or not at all, and found again by its checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from icl_markup.errors import BackboneError
from icl_markup.files import new_folder, read_regular, remove_leftovers, write_whole

VARIABLE = "ICL_MARKUP_CACHE"
"""The environment variable that names another folder for the cache."""

_MOST_NOTE = 2**16
_BLOCK = 2**22


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


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which is made if it is not there.

    Of several processes that need it one makes it, and the others wait. A process that is killed while it makes the
    folder leaves nothing that is taken for it.

    Args:
        place: the folder.
        make: writes its content into an empty folder that it is given; an error of it leaves nothing behind.

    Raises:
        BackboneError: the folder cannot be written.
    """
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if not place.is_dir():
                remove_leftovers(place.parent, place.name)
                with new_folder(place) as part:
                    make(part)
                    _flush(part)
    except OSError as error:
        raise BackboneError(
            f"{error.filename or place}: the cache cannot be written: {error.strerror or error}; make room, or set "
            f"{VARIABLE} to another folder"
        ) from error
    return place


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


def _flush(folder: Path) -> None:
    """Have the system write a folder's files to the disk before the folder takes its place."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # as other files are; some writers keep theirs to themselves
            with path.open("rb") as file:
                os.fsync(file.fileno())
