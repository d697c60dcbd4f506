"""The folder of a training run: its configuration, its log of metrics, and what is said when it cannot be written."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from icl_markup.config import to_dict
from icl_markup.errors import WarmupError
from icl_markup.files import remove_leftovers, reported, write_whole

METRICS = "metrics.jsonl"
_GO_ON = "what was saved before is intact; make room or make it writable, then resume the run"


def writing(folder: Path) -> AbstractContextManager[None]:
    """Report an error of the file system as a `WarmupError` that says how to go on."""
    return reported(WarmupError, folder, _GO_ON)


def open_output(folder: Path, config: Any, step: int) -> None:
    """Make the folder ready for a run that goes on after `step`, 0 for one that begins.

    Raises:
        WarmupError: it cannot be written, or its log holds something else.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if step:
            truncate_metrics(folder / METRICS, step)
            return
        write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())
        (folder / METRICS).unlink(missing_ok=True)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint, and a line that was cut short.

    Raises:
        WarmupError: the file is no log of metrics; it is left as it is.
        OSError: it cannot be read or written.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise WarmupError(f"{path}:{number}: no line of metrics; move the file away, and resume") from error
        kept.append(line)
    write_whole(path, b"".join(kept))
