"""Fewer activations are kept for the backward pass.

Of a frozen linear layer the backward pass needs the weights alone, so most of what is kept is what elementwise
functions leave behind. The product in a gated layer keeps the output of its activation function, though its input is
kept as well: the output is made again from it, to the same bits. An activation function that is written out in Python
keeps every step: GELU's tanh form (T5's) is computed by PyTorch's own function instead, which keeps its input alone,
and others are repeated. All of that is a pass over memory or less; `gradient_checkpointing` repeats whole layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import activations

_Function = Callable[[Tensor], Tensor]

_TANH_GELU = (activations.NewGELUActivation, activations.FastGELUActivation)

_ONE_FUNCTION = (nn.SiLU, nn.GELU, activations.SiLUActivation, activations.GELUActivation, activations.GELUTanh)
"""One function of PyTorch each, which keeps its input; two of them may be told to be written out."""

_STEPS = (
    activations.QuickGELUActivation,
    activations.AccurateGELUActivation,
    activations.MishActivation,
    activations.LaplaceActivation,
    activations.ReLUSquaredActivation,
)
"""Functions written out in Python. What keeps its own output (ReLU, tanh) has nothing to be made again from."""


def recomputes(module: nn.Module) -> bool:
    """Return whether a module, as gradient checkpointing has it, recomputes its activations in the backward pass."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """While active, a forward pass of `model` keeps no output of an activation function, and of its steps none.

    Gradients are the same to the bit but for the tanh form of GELU, where they are so to rounding. Only one thread may
    run the model meanwhile.
    """
    modules = [m for m in model.modules() if isinstance(m, (*_TANH_GELU, *_ONE_FUNCTION, *_STEPS)) and _is_plain(m)]
    made: dict[Any, _Remade] = {}

    def pack(tensor: Tensor) -> Tensor | _Remade:
        if tensor.grad_fn is None:
            return tensor
        # An operation that keeps its own output would keep itself alive by it, for ever where no gradient comes by.
        return made.get(tensor.grad_fn) or tensor.detach()

    def unpack(kept: Tensor | _Remade) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.again()

    def forward(original: _Function, function: _Function, repeat: bool, given: Tensor) -> Tensor:
        if not (given.requires_grad and torch.is_grad_enabled()):
            return original(given)
        if repeat:
            output: Tensor = checkpoint(function, given, use_reentrant=False, preserve_rng_state=False)
        else:
            output = function(given)
        made[output.grad_fn] = _Remade.of(function, given)
        return output

    for module in modules:
        function = partial(F.gelu, approximate="tanh") if isinstance(module, _TANH_GELU) else module.forward
        repeat = isinstance(module, _STEPS)
        module.forward = partial(forward, module.forward, function, repeat)  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for module in modules:
            del module.forward


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody else has put a function in the place of a module's own, and it leaves its input as it is."""
    written_out = "python" in getattr(getattr(module, "act", None), "__name__", "")
    return "forward" not in vars(module) and not getattr(module, "inplace", False) and not written_out


class _Remade(NamedTuple):
    """An output that is made again from its input, under the autocast that it was made under."""

    function: _Function
    given: Tensor
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, function: _Function, given: Tensor) -> _Remade:
        kind = given.device.type
        return cls(function, given.detach(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.given.device.type, self.dtype, enabled=self.autocast):
            return self.function(self.given)
