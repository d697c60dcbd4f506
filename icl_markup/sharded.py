"""Backbones larger than one device: their layers are split over the processes, the rest each has whole.

FSDP2 splits them if `accelerate launch` was told to. A layer's weights are gathered while it computes, and again in the
backward pass; the shares may lie in main memory. They are frozen, so nothing of them is ever reduced.
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
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from icl_markup.errors import BackboneError


def check_launcher() -> None:
    """Check that `accelerate launch`, if it was told to split models over processes, was told to use FSDP2.

    Raises:
        BackboneError: it was told otherwise.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise BackboneError(
            "accelerate's configuration asks for DeepSpeed; split a backbone by configs/accelerate/fsdp2.yaml, with "
            "fsdp_config.fsdp_offload_params true if its layers are to lie in main memory"
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise BackboneError(f"accelerate's configuration asks for FSDP {version}; set fsdp_config.fsdp_version to 2")
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise BackboneError(
            "with accelerate's fsdp_cpu_ram_efficient_loading only the first process reads the weights, and each needs "
            "them here; set fsdp_config.fsdp_cpu_ram_efficient_loading to false"
        )


def shards_layers() -> bool:
    """Return whether `accelerate launch` has started several processes and was told to split models over them.

    One process counts, too, if the layers are to lie in main memory.

    Raises:
        BackboneError: as `check_launcher`.
    """
    check_launcher()
    if not (_is_set("ACCELERATE_USE_FSDP") and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1 or offloads_layers()


def offloads_layers() -> bool:
    """Return whether `accelerate launch` was told to keep the shares of split models in main memory."""
    return _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_OFFLOAD_PARAMS")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Split the layers of a model over all processes, in place, and put the rest of it on the device.

    Args:
        model: the same in every process, on the CPU: what lands on the device at once is one layer.
        device: this process's device.

    Raises:
        BackboneError: the model has no list of layers.
    """
    stacks = _stacks(model)
    if not stacks:
        raise BackboneError(f"{type(model).__name__} has no list of layers to split over processes")
    model.requires_grad_(False)
    _move_rest(model, stacks, device)
    _split(stacks, device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether some weights of a model are split over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(value: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered where it is split, for which all processes must ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _move_rest(model: nn.Module, stacks: Sequence[tuple[nn.Module, nn.ModuleList]], device: torch.device) -> None:
    """Put what stands outside the layers on the device; `fully_shard` does so with a layer's share or its buffers."""
    inside = {module for _, layers in stacks for module in layers.modules()}
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _split(stacks: Sequence[tuple[nn.Module, nn.ModuleList]], device: torch.device) -> None:
    """Split layers over all processes by FSDP2, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offloads_layers() else OffloadPolicy()
    for stack, layers in stacks:
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        # The stack fetches a layer while the one before computes. It holds nothing of its own.
        whole = {p for p in stack.parameters() if not isinstance(p, DTensor)}
        fully_shard(stack, mesh=mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=whole)


def _stacks(module: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the outermost lists of layers, and the modules that they stand in."""
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child.parameters()):
            found.append((module, child))
        else:
            found += _stacks(child)
    return found
