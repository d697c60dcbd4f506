"""What ships inside the package: a small backbone and sample tasks, so that everything runs without a hub."""

from __future__ import annotations

from pathlib import Path

NAME = "embedded"
_FOLDER = Path(__file__).parent


def resolve(name: str) -> str:
    """Return the folder of the embedded backbone for the name ``embedded``, and any other name as it is."""
    return str(_FOLDER / "backbone") if name == NAME else name


def sample_folders(side: str) -> list[Path]:
    """Return the folders of the sample tasks of one side, ``warmup`` or ``unseen``, sorted by name."""
    return sorted(path.parent for path in (_FOLDER / "tasks" / side).glob("*/meta.json"))


def quickstart_config() -> Path:
    """Return the quickstart's configuration file."""
    return _FOLDER / "configs" / "quickstart.yaml"
