"""Layers split over processes by DeepSpeed's ZeRO-3, which can keep its shares of them in main memory.

DeepSpeed is given the layers and nothing else. Tags and what trains them are not its own, so there is no engine of it,
and accelerate, which would go backwards through one, is not to know of it. Reference: ZeRO (Rajbhandari et al. 2020,
arXiv 1910.02054).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import compare_versions
from pydantic import ValidationError
from torch import Tensor, nn

from icl_markup.errors import BackboneError

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

INSTALL = 'pip install "icl-markup[deepspeed]"'
_OLDEST = "0.19.4"
"""Versions before it (0.19.0 was tried) take frozen weights away while a layer is recomputed in the backward pass."""

_ACCELERATE = "ACCELERATE_USE_DEEPSPEED"
_OURS = "ICL_MARKUP_USE_DEEPSPEED"

_DEFAULTS = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
"""Unless a file says otherwise, a layer is given up as soon as it has computed. DeepSpeed would keep a billion weights
for the backward pass, and small weights for ever."""


_ACCELERATE_KEYS = (
    "accelerate's configuration",
    "deepspeed_config.zero_stage",
    "deepspeed_config.offload_param_device",
)
_FILE_KEYS = ("zero_optimization.stage", "zero_optimization.offload_param.device")


def is_told() -> bool:
    """Return whether `accelerate launch` was told to use DeepSpeed."""
    return any(os.environ.get(name, "false").lower() == "true" for name in (_ACCELERATE, _OURS))


def check() -> None:
    """Check that DeepSpeed is there, and that what it was told to do is what it does here.

    Raises:
        BackboneError: it is not installed or too old, it was told of a stage other than 3 or of weights on NVMe, or the
            file that says so cannot be read.
    """
    try:
        is_old = compare_versions("deepspeed", "<", _OLDEST)
    except PackageNotFoundError as error:
        raise BackboneError(f"accelerate was told to use DeepSpeed, which is not installed: {INSTALL}") from error
    if is_old:
        raise BackboneError(f"accelerate was told to use DeepSpeed, which is older than {_OLDEST}: {INSTALL}")
    settings = _settings()
    file = _file()
    of, stage_key, place_key = _ACCELERATE_KEYS if file is None else (file, *_FILE_KEYS)
    if str(settings.get("stage", 0)) != "3":
        raise BackboneError(
            f"{of} asks for ZeRO stage {settings.get('stage', 0)} of DeepSpeed, which does not split a frozen model; "
            f"set {stage_key} to 3"
        )
    place = settings.get("offload_param")
    device = place.get("device", "none") if isinstance(place, dict) else "none"
    if device not in ("none", "cpu"):
        raise BackboneError(
            f"{of} asks for weights on {device}, where DeepSpeed cannot keep them here; set {place_key} to cpu or none"
        )


def hide_from_accelerate() -> None:
    """Let accelerate take the processes for ones that each have the whole model: it would call DeepSpeed's engine."""
    if is_told():
        os.environ.update({_OURS: "true", _ACCELERATE: "false"})


def split(stacks: Sequence[tuple[nn.Module, nn.ModuleList]], device: torch.device) -> None:
    """Split layers over all processes, in place; those of the first process are taken.

    Args:
        stacks: lists of layers, and the modules that they stand in, frozen and on the CPU.
        device: this process's device.

    Raises:
        BackboneError: a setting does not fit DeepSpeed.
    """
    _prepare(device)
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import set_z3_leaf_module

    config = _config()
    place = config.offload_param
    for stack, layers in stacks:
        for module in layers.modules():
            if isinstance(module, nn.ModuleDict) and type(module) is not nn.ModuleDict:
                # Experts by name: each process chooses its own, but all must gather the same.
                set_z3_leaf_module(module, True)
        Init(
            module=layers,
            mem_efficient_linear=False,  # would replace the function for all of PyTorch
            remote_device=None if place is None else place.device,
            pin_memory=place is not None and place.pin_memory,
        )
        hooks = DeepSpeedZeRoOffload(
            layers,
            timers=None,
            ds_config=None,  # is read where layers are not split yet
            overlap_comm=bool(config.overlap_comm),
            prefetch_bucket_size=config.prefetch_bucket_size,
            max_reuse_distance=config.max_reuse_distance,
            max_live_parameters=config.max_live_parameters,
            param_persistence_threshold=config.param_persistence_threshold,
            model_persistence_threshold=config.model_persistence_threshold,
            offload_param_config=place,
        )
        _follow(stack, layers, hooks.get_param_coordinator())
        for module in layers.modules():
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


def is_split(value: Tensor) -> bool:
    """Return whether a parameter is one that `split` has split."""
    return hasattr(value, "ds_tensor")


def gathered(value: Tensor) -> Tensor:
    """Return a split parameter as it was, put together of all shares, for which all processes must ask at once."""
    split: Any = value
    mine = split.ds_tensor.to(value.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    whole: Tensor = torch.cat(parts)[: split.ds_numel].view(split.ds_shape)
    return whole


def _settings() -> dict[str, Any]:
    """Return ``zero_optimization`` of the file of DeepSpeed's that accelerate's configuration names, or what it says.

    Raises:
        BackboneError: the file cannot be read.
    """
    path = _file()
    if path is None:
        device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        return {"stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "offload_param": {"device": device}}
    try:
        found = dict(json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"])
    except OSError as error:
        raise BackboneError(f"--deepspeed_config_file {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise BackboneError(
            f"--deepspeed_config_file {path}: no configuration of DeepSpeed; it must be JSON with a mapping "
            "zero_optimization, of which stage is 3"
        ) from error
    return {name: value for name, value in found.items() if value != "auto"}


def _file() -> str | None:
    """Return the path that ``--deepspeed_config_file`` gives, or None."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path == "none" else path


def _config() -> DeepSpeedZeroConfig:
    """Return what DeepSpeed makes of the settings, and of those that are left open.

    Raises:
        BackboneError: it knows no such setting, or no such value of one.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**{**_DEFAULTS, **_settings()})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise BackboneError(f"{_file() or 'DeepSpeed'}: {name}: {first['msg']}; correct it or leave it out") from error


def _prepare(device: torch.device) -> None:
    """Let DeepSpeed take the device and the group of processes that are there."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is first imported
    import deepspeed

    if device.type == "cpu":
        # It would compile, for a minute, a faster way to add up over processes, which is not needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)


def _follow(stack: nn.Module, layers: nn.ModuleList, coordinator: Any) -> None:
    """Tell DeepSpeed when a pass through a list of layers begins, and when nothing is left to come of it.

    It learns from a pass which layers follow each other, and fetches them ahead in the next: also those of a backward
    pass, which then may not come.
    """

    def begin(*_: Any) -> None:
        coordinator.reset_step()

    def end(*_: Any) -> None:
        if not torch.is_grad_enabled():
            coordinator.release_and_reset_all(layers)

    stack.register_forward_pre_hook(begin)
    stack.register_forward_hook(end)


def _linear(layer: nn.Linear, given: Tensor) -> Tensor:
    """Compute a linear layer without keeping its weights for the backward pass, which fetches them again."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    output: Tensor = zero3_linear_wrap(given, layer.weight, layer.bias)
    return output
