"""Checkpoints of a warm-up: the tag table, the optimiser's moments and the counters, written atomically."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from icl_markup.errors import WarmupError

_NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """Everything, besides tensors, that a warm-up must remember to continue to the bit."""

    step: int = 0
    """Optimiser steps taken."""

    window: int = 0
    """The stream's window."""

    batch: int = 0
    """Batches of that window already consumed."""

    best_step: int = 0
    """The step whose tags are the best so far."""

    best_accuracy: float = -1.0
    """Their validation accuracy."""

    best_loss: float = float("inf")
    """Their validation loss."""

    stale: int = 0
    """Validations since the best one."""

    tokens: int = 0
    """Tokens trained on."""

    positions: int = 0
    """The same with padding."""

    finished: bool = False
    """Whether the run has come to its end."""

    schedule: dict[str, Any] = field(default_factory=dict)
    """The state of the learning-rate schedule."""

    loss_scale: dict[str, Any] = field(default_factory=dict)
    """The state of fp16's loss scaling."""


def save_checkpoint(
    folder: Path, rows: Tensor, best: Tensor, optimizer: torch.optim.Optimizer, progress: Progress, config: Any
) -> None:
    """Write a checkpoint into `folder`, in one file, replacing the one that is there.

    Raises:
        OSError: the file cannot be written; the previous checkpoint is intact.
    """
    tensors = {"rows": rows.detach().cpu().contiguous(), "best": best.detach().cpu().contiguous()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
    details = json.dumps({"progress": asdict(progress), "config": config})
    part = folder / (_NAME + ".part")
    with part.open("wb") as out:
        out.write(save(tensors, metadata={"details": details}))
        out.flush()
        os.fsync(out.fileno())
    part.replace(folder / _NAME)


def has_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint."""
    return (folder / _NAME).exists()


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor, Progress, Any]:
    """Read a checkpoint; the optimiser's state is restored in place.

    Returns:
        The tag rows, the best tag rows, the progress, and the configuration of the run.

    Raises:
        WarmupError: the checkpoint is damaged.
    """
    path = folder / _NAME
    try:
        raw = path.read_bytes()
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        details = json.loads(header["__metadata__"]["details"])
        progress = Progress(**details["progress"])
        rows, best = tensors.pop("rows"), tensors.pop("best")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WarmupError(f"{path}: damaged checkpoint ({error}); delete it to start afresh") from error
    state = optimizer.state_dict()
    restored: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        restored.setdefault(int(index), {})[name] = value
    state["state"] = restored
    optimizer.load_state_dict(state)
    return rows, best, progress, details["config"]
