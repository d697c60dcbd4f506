"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            # A folder that is not empty cannot be replaced in one call: the old one steps aside and, if the new one
            # cannot take its place, comes back.
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / "was")
            try:
                part.rename(folder)
            except BaseException:
                (old / "was").rename(folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
