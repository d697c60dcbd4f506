"""Checkpoints of a warm-up: the tag table, the optimiser's moments and the counters, written atomically."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from icl_markup.errors import WarmupError
from icl_markup.files import read_regular, write_whole

_NAME = "checkpoint.safetensors"
_MOST = 2**40
"""A file of more bytes than this is no checkpoint."""


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
    told = {"progress": asdict(progress), "config": config}
    details = json.dumps({**told, "sha256": _digest(tensors, told)})
    write_whole(folder / _NAME, save(tensors, metadata={"details": details}))


def has_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint."""
    return (folder / _NAME).exists()


def drop_checkpoint(folder: Path) -> None:
    """Delete the checkpoint: that of a whole model is several times as large as the trained weights."""
    (folder / _NAME).unlink(missing_ok=True)


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor, Progress, Any]:
    """Read a checkpoint; the optimiser's state is restored in place.

    Returns:
        The tag rows, the best tag rows, the progress, and the configuration of the run.

    Raises:
        WarmupError: the checkpoint is damaged.
    """
    path = folder / _NAME
    try:
        raw = read_regular(path, _MOST)
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        details = json.loads(header["__metadata__"]["details"])
        progress = Progress(**details["progress"])
        told = details.pop("sha256", None)  # there was none in earlier versions
        if told is not None and told != _digest(tensors, details):
            raise ValueError("its content differs from its checksum")
        rows, best, config = tensors.pop("rows"), tensors.pop("best"), details["config"]
        _check(progress, config)
        restored: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            _, index, name = key.split(".", 2)
            restored.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
    except OSError as error:
        raise WarmupError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WarmupError(f"{path}: damaged checkpoint ({error}); delete it to start afresh") from error
    return rows, best, progress, config


def _digest(tensors: dict[str, Tensor], told: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check(progress: Progress, config: Any) -> None:
    """Check the types of what was read.

    Raises:
        TypeError: one is wrong.
    """
    for known in fields(Progress):
        kind, value = type(getattr(Progress(), known.name)), getattr(progress, known.name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{known.name} is {value!r}")
    if not isinstance(config, dict):
        raise TypeError(f"the configuration is {config!r}")
