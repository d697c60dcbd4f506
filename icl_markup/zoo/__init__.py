"""Warmed-up tags that ship with the package, by the names of the models that they are for.

Each folder is a tag folder like any other, with a card. ``scripts/make_zoo.py`` makes them again.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def zoo_names() -> list[str]:
    """Return the names of the tags that ship with the package, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/tags.json"))


def zoo_folder(name: str) -> Path | None:
    """Return the folder of some tags of the zoo; None if it has none of that name."""
    return _FOLDER / name if name in zoo_names() else None
