"""What a computation costs, operation by operation: FLOPs, bytes moved, bytes alive.

A `Ledger` sees every operation that PyTorch dispatches, forward and backward. It does not matter whether tensors hold
numbers or are fake ones (`icl_markup.skeleton`): shapes, types and lifetimes are the same, so the cost of a model that
nobody has loaded is found by running it. Only what kernels allocate inside of themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Phase: TypeAlias = Literal["body", "head", "backward"]
"""The model up to its head, forward; candidates' logits and loss; the backward pass of both."""

PHASES: tuple[Phase, ...] = ("body", "head", "backward")
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorSpec:
    """All that matters of a tensor whose numbers do not."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Read it off a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type)


@dataclass
class Operation:
    """One operation on inputs of certain shapes and types, and how often it was called.

    Attributes:
        function: the operation.
        args: its positional arguments, tensors as `TensorSpec`, but for real indices, which are as they are.
        kwargs: its keyword arguments, likewise.
        flops: floating-point operations of one call, a multiply-add counted as two; 0 but for products of matrices
            and attention.
        moved: bytes of inputs and outputs of one call.
        half: whether it multiplies numbers of 16 bits.
        attends: whether it is attention's product of tokens with tokens.
        calls: how often it was called, by phase.
    """

    function: Any
    args: Any
    kwargs: Any
    flops: int
    moved: int
    half: bool
    attends: bool
    calls: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))

    def times(self, *phases: Phase) -> int:
        """Return how often it was called in some phases (in none given: in all)."""
        return sum(self.calls[phase] for phase in phases or PHASES)


class Ledger(TorchDispatchMode):
    """While active, notes every operation.

    Args:
        weights: the tensors that lie there anyway: they are not counted as alive.

    Attributes:
        phase: the phase that operations are noted under; whoever computes sets it.
        operations: what was noted, by operation, shapes and types.
        alive: bytes of tensors that were made while active and are still referred to.
        peak: the most that these ever were.
        casts: bytes alive that are copies of weights in another type, as autocast makes them.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.phase: Phase = "body"
        self.operations: dict[Any, Operation] = {}
        self.alive = self.peak = self.casts = 0
        self._weights = {id(weight.untyped_storage()): weight.untyped_storage() for weight in weights}
        self._known: dict[int, weakref.ref[Any]] = {}

    def flops(self, *phases: Phase, attention: bool = False) -> int:
        """Return the floating-point operations of some phases (in none given: of all), or those of attention alone."""
        counted = (one for one in self.operations.values() if one.attends or not attention)
        return sum(one.flops * one.times(*phases) for one in counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = {id(tensor.untyped_storage()) for tensor in inputs}
        is_cast = func is torch.ops.aten._to_copy.default and bool(given & self._weights.keys())
        made = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in given]
        for tensor in made:
            self._note_storage(tensor.untyped_storage(), is_cast)
        if made or func._schema.is_mutable:
            self._note_operation(func, args, kwargs, inputs, outputs, out)
        return out

    def _note_storage(self, storage: Any, is_cast: bool) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._weights:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive -= size
            self.casts -= size * is_cast

        # A storage's Python object lives as long as the storage itself.
        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.casts += size * is_cast
        self.peak = max(self.peak, self.alive)

    def _note_operation(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any
    ) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        known = tuple(TensorSpec.of(x) if isinstance(x, Tensor) else repr(x) for x in leaves)
        key = (func, known, str(structure))
        if key not in self.operations:
            count = _FORMULAS.get(func._overloadpacket)
            kept_args, kept_kwargs = tree_map_only(Tensor, _kept, (args, kwargs))
            self.operations[key] = Operation(
                func,
                kept_args,
                kept_kwargs,
                flops=int(count(*args, **kwargs, out_val=out)) if count else 0,
                moved=sum(_size(tensor) for tensor in [*inputs, *outputs]),
                half=any(tensor.dtype in _HALVES for tensor in inputs),
                attends=func._overloadpacket in _ATTENTION,
            )
        self.operations[key].calls[self.phase] += 1


def _kept(tensor: Tensor) -> TensorSpec | Tensor:
    """Return what stands for a tensor: a copy of real indices, or its shape. It must not stay alive."""
    if isinstance(tensor, FakeTensor) or tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        return TensorSpec.of(tensor)
    return tensor.clone()


def _size(tensor: Tensor) -> int:
    """Return the bytes that reading or writing a tensor moves; what is expanded lies there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_on_cpu_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# PyTorch knows no formula for its attention on CPUs.
_ON_CPU: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_on_cpu_backward,
}
_FORMULAS: dict[Any, Callable[..., Any]] = {**_ON_CPU, **flop_registry}
_ATTENTION = {
    one for one in _FORMULAS if "attention" in str(one) or one in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
}
