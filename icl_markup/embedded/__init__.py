"""What ships inside the package: sample tasks, and the quickstart's configuration."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def sample_folders(side: str) -> list[Path]:
    """Return the folders of the sample tasks of one side, ``warmup`` or ``unseen``, sorted by name."""
    return sorted(path.parent for path in (_FOLDER / "tasks" / side).glob("*/meta.json"))


def quickstart_config() -> Path:
    """Return the quickstart's configuration file."""
    return _FOLDER / "configs" / "quickstart.yaml"
