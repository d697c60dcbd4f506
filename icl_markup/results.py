"""Rows of results: tidy JSONL lines that say what was measured, and with what."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from icl_markup.evaluation import Estimate
from icl_markup.files import write_whole


def result_row(
    *,
    experiment: str,
    task: str,
    backbone: str,
    method: str,
    estimate: Estimate,
    template: str | None,
    n_way: int | None,
    k_shot: int,
    seed: int,
    episodes: int,
    trainable_parameters: int,
    command: str,
    **more: Any,
) -> dict[str, Any]:
    """Return one row; accuracies lie between 0 and 1, `low` and `high` bound the 95 % interval."""
    return {
        "experiment": experiment,
        "task": task,
        "backbone": backbone,
        "method": method,
        "template": template,
        "n_way": n_way,
        "k_shot": k_shot,
        "seed": seed,
        "episodes": episodes,
        "accuracy": round(estimate.mean, 5),
        "low": round(estimate.low, 5),
        "high": round(estimate.high, 5),
        "trainable_parameters": trainable_parameters,
        **more,
        "command": command,
        **provenance(),
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]], *, replace: bool = False) -> None:
    """Append rows to a JSONL file, or replace its content by them (whole or not at all), making its folder."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        write_whole(path, lines.encode())
        return
    with path.open("a", encoding="utf-8") as out:
        out.write(lines)


def provenance() -> dict[str, Any]:
    """Return what a number was measured with: commit, versions and hardware."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware()}


@cache
def commit() -> str | None:
    """Return the commit of this package's checkout, marked where files differ from it; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that numbers depend on."""
    import transformers

    import icl_markup

    return {
        "icl-markup": icl_markup.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hardware() -> str:
    """Return the processor (or the accelerator) and the number of threads, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
