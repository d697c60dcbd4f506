"""How long operations take on this machine: each is run a few times on random numbers.

Layers repeat the same few operations, so that measuring every one of them takes a fraction of one step, and needs one
operation's memory and no weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from icl_markup.ledger import Operation, Phase, TensorSpec

_COPIES = 4
"""Copies of the inputs that take turns, so that caches hold no more of them than in a run."""

_SCRATCH_BYTES = 16 * 2**20
"""What is touched between calls, so that inputs lie no nearer than in a run."""

_NEAR_BYTES = 2**20
"""An operation that moves no more finds its inputs where the one before has left them, in the near caches."""

_BLOCKS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten._softmax, torch.ops.aten._softmax_backward_data)
_BLOCK_BYTES = 4 * 2**20
"""These find up to so much there."""

_HELD_BYTES = 256 * 2**20
"""How much of the outputs is kept at most."""

_CALLS = (3, 7)
"""Fewest and most calls that are timed; the median counts."""

_ENOUGH_SECONDS = 0.02
"""An operation is not called again once its calls took as long."""


class Stopwatch:
    """Times operations, each once.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._known: dict[Any, float] = {}
        self._scratch = torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        self._numbers = torch.empty(0)
        self._held: list[Any] = []
        self._held_bytes = 0

    @torch.no_grad()
    def seconds(self, operations: Iterable[tuple[Any, Operation]], *phases: Phase) -> float:
        """Return the seconds that all calls of operations take.

        Args:
            operations: operations by their keys, as a `Ledger` has them.
            phases: count calls of these phases alone; none given: all.
        """
        total = 0.0
        for key, one in operations:
            times = one.times(*phases)
            if times:
                if key not in self._known:
                    self._known[key] = self._measured(one)
                total += times * self._known[key]
        return total

    def _measured(self, one: Operation) -> float:
        in_blocks = getattr(one.function, "overloadpacket", one.function) in _BLOCKS
        near = one.moved <= (_BLOCK_BYTES if in_blocks else _NEAR_BYTES)
        made = [self._inputs(one) for _ in range(1 if near else _COPIES)]

        def call(number: int) -> float:
            args, kwargs = made[number % len(made)]
            if not near:
                self._scratch.add_(1)
            self._wait()
            began = time.perf_counter()
            out = one.function(*args, **kwargs)
            self._wait()
            seconds = time.perf_counter() - began
            if not near:
                self._hold(out, one.moved)
            return seconds

        call(0)
        found: list[float] = []
        while len(found) < _CALLS[0] or (sum(found) < _ENOUGH_SECONDS and len(found) < _CALLS[1]):
            found.append(call(len(found)))
        return statistics.median(found)

    def _hold(self, out: Any, size: int) -> None:
        """Keep outputs for a while, as a forward pass does: the next ones then lie in fresh memory."""
        self._held.append(out)
        self._held_bytes += size
        if self._held_bytes > _HELD_BYTES:
            self._held, self._held_bytes = [], 0

    def _inputs(self, one: Operation) -> Any:
        # Copies: operations in place must change nothing that others are given.
        real = tree_map_only(Tensor, lambda tensor: tensor.to(self.device, copy=True), (one.args, one.kwargs))
        args, kwargs = tree_map_only(TensorSpec, self._filled, real)
        if one.function is torch.ops.aten.native_layer_norm_backward.default:
            # Of 16-bit inputs and 32-bit weights, kernels keep means in 32 bits; fake tensors have them in 16.
            wide = [args[5].dtype if isinstance(args[5], Tensor) else args[3].dtype] * 2
            args = [*args[:3], *(x.to(t) for x, t in zip(args[3:5], wide, strict=True)), *args[5:]]
        return args, kwargs

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _filled(self, spec: TensorSpec) -> Tensor:
        """Return a tensor of this shape, stride and type: random numbers, or zeros where it holds none with a point."""
        size = 0
        if 0 not in spec.shape:
            size = 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
        if not spec.dtype.is_floating_point:
            return torch.zeros(size, dtype=spec.dtype, device=self.device).as_strided(spec.shape, spec.stride)
        if size > len(self._numbers):
            self._numbers = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(self.device)
        return self._numbers[:size].to(spec.dtype, copy=True).as_strided(spec.shape, spec.stride)
