"""What a computation costs: FLOPs, the most bytes alive, and seconds on accelerators.

`Costs` sees every operation that PyTorch dispatches, forward and backward. It does not matter whether tensors hold
numbers or are fake ones (`icl_markup.skeleton`): shapes, types and lifetimes are the same, so the cost of a model that
nobody has loaded is found by running it. What kernels allocate inside of themselves is not seen.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from icl_markup.errors import ConfigError, nearest

Phase = Literal["forward", "backward"]
HALVES = (torch.bfloat16, torch.float16)
HERE = "here"
"""The name of this machine among accelerators."""

MATRIX_SHARE, BANDWIDTH_SHARE = 0.5, 0.7
"""Assumed: the shares of a data sheet's peak and bandwidth that a program reaches."""

LAUNCH_SECONDS = 10e-6
"""Assumed: the time in which Python gives an accelerator one operation; small batches wait for it."""


@dataclass(frozen=True)
class Accelerator:
    """What computes.

    Attributes:
        name: what it is called on the command line.
        half: products of 16-bit numbers with fp32 sums that it reaches, operations a second.
        single: the same for fp32 (without TF32, which PyTorch leaves off).
        bandwidth: of its memory, bytes a second that it reaches.
        memory: bytes; None where that is not known.
        has_bf16: whether it computes in bf16.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int | None = None
    has_bf16: bool = True


_SHEETS = {  # vendors' data sheets: 10¹² operations a second without sparsity, 10⁹ bytes a second, GiB
    "t4": (65.0, 8.1, 320, 16),
    "v100-16": (125.0, 15.7, 900, 16),
    "v100-32": (125.0, 15.7, 900, 32),
    "a10": (125.0, 31.2, 600, 24),
    "a100-40": (312.0, 19.5, 1555, 40),
    "a100-80": (312.0, 19.5, 2039, 80),
    "l4": (121.0, 30.3, 300, 24),
    "l40s": (366.0, 91.6, 864, 48),
    "rtx3090": (71.0, 35.6, 936, 24),
    "rtx4090": (165.2, 82.6, 1008, 24),
    "h100": (989.5, 67.0, 3350, 80),
    "h100-pcie": (756.5, 51.0, 2000, 80),
    "h200": (989.5, 67.0, 4800, 141),
    "mi300x": (1307.4, 163.4, 5300, 192),
}
ACCELERATORS = {
    name: Accelerator(
        name,
        half * 1e12 * MATRIX_SHARE,
        single * 1e12 * MATRIX_SHARE,
        bandwidth * 1e9 * BANDWIDTH_SHARE,
        memory * 2**30,
        has_bf16=not name.startswith(("t4", "v100")),
    )
    for name, (half, single, bandwidth, memory) in _SHEETS.items()
}
"""Accelerators by name, with the rates that are assumed to be reached; none was measured by us."""


def accelerator(name: str) -> Accelerator:
    """Return an accelerator of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ACCELERATORS:
        raise ConfigError(
            f"--accelerators: {name!r} is not known{nearest(name, ACCELERATORS)}; there are here (this machine, which "
            f"is measured), {', '.join(ACCELERATORS)}"
        )
    return ACCELERATORS[name]


def measured(device: torch.device) -> Accelerator:
    """Measure a device here: products of matrices of 1,024 rows, and copies of 128 MiB."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(1024, 1024, dtype=dtype, device=device)
        rates[dtype] = 2 * 1024**3 / _seconds(square.matmul, square)
    source = torch.ones(2**25, device=device)
    moved = 2 * source.numel() * source.element_size()
    bandwidth = moved / _seconds(torch.empty_like(source).copy_, source)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Accelerator(HERE, rates[torch.bfloat16], rates[torch.float32], bandwidth, memory)


def _seconds(function: Callable[[Tensor], Tensor], given: Tensor, calls: int = 7) -> float:
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        function(given).flatten()[0].item()  # waits for a device
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


class Costs(TorchDispatchMode):
    """While active, adds up what operations cost.

    Args:
        weights: tensors that lie there anyway: they are not counted as alive.
        accelerators: what to find the time on. An operation takes the longer of its arithmetic and its traffic to
            memory; all of them take no less than Python takes to launch them.

    Attributes:
        phase: the phase that operations are noted under; whoever computes sets it.
        flops: floating-point operations by phase: those of products of matrices and of attention, a multiply-add
            counted as two.
        alive: bytes of tensors that were made while active and are still referred to.
        peak: the most that these ever were.
    """

    def __init__(self, weights: Iterable[Tensor] = (), accelerators: Sequence[Accelerator] = ()):
        super().__init__()
        self.phase: Phase = "forward"
        self.flops: dict[Phase, int] = {"forward": 0, "backward": 0}
        self.alive = self.peak = 0
        self._accelerators = accelerators
        self._busy: dict[tuple[str, Phase], float] = {}
        self._calls: dict[Phase, int] = {"forward": 0, "backward": 0}
        self._known: dict[int, Any] = {id(weight.untyped_storage()): weight.untyped_storage() for weight in weights}

    def seconds(self, on: Accelerator, *phases: Phase) -> float:
        """Return the seconds that the operations of some phases take."""
        calls = sum(self._calls[phase] for phase in phases) if on.name != HERE else 0
        return max(sum(self._busy.get((on.name, phase), 0.0) for phase in phases), calls * LAUNCH_SECONDS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {id(tensor.untyped_storage()) for tensor in inputs}
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in given]
        for tensor in made:
            self._note_storage(tensor.untyped_storage())
        if made or func._schema.is_mutable:
            count = _FORMULAS.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count else 0
            self.flops[self.phase] += flops
            self._calls[self.phase] += 1
            moved = sum(_size(tensor) for tensor in [*inputs, *outputs])
            half = any(tensor.dtype in HALVES for tensor in inputs)
            for on in self._accelerators:
                took = max(flops / (on.half if half else on.single), moved / on.bandwidth)
                self._busy[on.name, self.phase] = self._busy.get((on.name, self.phase), 0.0) + took
        return out

    def _note_storage(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        # A storage's Python object lives as long as the storage itself.
        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _size(tensor: Tensor) -> int:
    """Return the bytes that reading or writing a tensor moves; what is expanded lies there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_on_cpu_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Callable[..., Any]] = {  # PyTorch has none for its attention on CPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_on_cpu_backward,
    **flop_registry,
}
