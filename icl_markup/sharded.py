"""Backbones larger than one device: their layers are split over the processes, the rest each has whole.

FSDP2 splits them, or DeepSpeed's ZeRO-3 (`icl_markup.zero`), as `accelerate launch` was told. A layer's weights are
gathered while it computes, and again in the backward pass. They are frozen, so nothing of them is ever reduced.
Embedding, head and what else lies outside the layers stay whole in every process, as rows of them are read by
themselves and tags stand in for some; so does the table of tags, whose gradient a warm-up adds up itself.

While such a backbone computes, all processes must, the same number of times: they train on batches of their own, but
answer the same queries.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from icl_markup import zero
from icl_markup.errors import BackboneError


def check_launcher() -> None:
    """Check that `accelerate launch`, if it was told to split models over processes, was told of FSDP2 or ZeRO-3.

    Raises:
        BackboneError: it was told otherwise, or of a DeepSpeed that is not there.
    """
    if zero.is_told():
        zero.check()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise BackboneError(f"accelerate's configuration asks for FSDP {version}; set fsdp_config.fsdp_version to 2")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise BackboneError(
            "with accelerate's fsdp_cpu_ram_efficient_loading only the first process reads the weights, and each needs "
            "them here; set fsdp_config.fsdp_cpu_ram_efficient_loading to false"
        )


def shards_layers() -> bool:
    """Return whether `accelerate launch` has started several processes and was told to split models over them.

    One process of DeepSpeed counts, too: what is split over it can lie in main memory.

    Raises:
        BackboneError: as `check_launcher`.
    """
    check_launcher()
    if zero.is_told():
        return dist.is_initialized()
    told = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return told and dist.is_initialized() and dist.get_world_size() > 1


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Split the layers of a model over all processes, in place, and put the rest of it on the device.

    Args:
        model: the same in every process, on the CPU: what lands on the device at once is one layer.
        device: this process's device.

    Raises:
        BackboneError: the model has no list of layers, or a setting does not fit DeepSpeed.
    """
    stacks = _stacks(model)
    if not stacks:
        raise BackboneError(f"{type(model).__name__} has no list of layers to split over processes")
    model.requires_grad_(False)
    (zero.split if zero.is_told() else _split)(stacks, device)
    model.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether some weights of a model are split over processes."""
    return any(isinstance(p, DTensor) or zero.is_split(p) for p in model.parameters())


def whole(value: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered where it is split, for which all processes must ask together."""
    if zero.is_split(value):
        return zero.gathered(value)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _split(stacks: Sequence[tuple[nn.Module, nn.ModuleList]], device: torch.device) -> None:
    """Split layers over all processes by FSDP2, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for stack, layers in stacks:
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The stack fetches a layer while the one before computes. It holds nothing of its own.
        whole = {p for p in stack.parameters() if not isinstance(p, DTensor)}
        fully_shard(stack, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _stacks(module: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the outermost lists of layers, and the modules that they stand in."""
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child.parameters()):
            found.append((module, child))
        else:
            found += _stacks(child)
    return found
