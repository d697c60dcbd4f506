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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import activations

_Function = Callable[[Tensor], Tensor]

_KNOWN = tuple({found[0] if isinstance(found, tuple) else found for found in activations.ACT2CLS.values()})
"""The classes of transformers' activation functions; all but two have no parameters."""

_TANH_GELU = (activations.NewGELUActivation, activations.FastGELUActivation)

_ONE_FUNCTION = (
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    activations.SiLUActivation,
    activations.GELUActivation,
    activations.GELUTanh,
    activations.LinearActivation,
)
"""One function of PyTorch each, which keeps its input or its output alone."""


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """While active, a forward pass of `model` keeps no output of an activation function, and of its steps none.

    Gradients are the same to the bit but for the tanh form of GELU, where they are so to rounding. Only one thread may
    run the model meanwhile.
    """
    modules = [m for m in model.modules() if isinstance(m, _KNOWN) and next(m.parameters(), None) is None]
    made: dict[Any, tuple[_Function, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[_Function, Tensor]:
        found = made.get(tensor.grad_fn) if tensor.grad_fn is not None else None
        return tensor if found is None else found

    def unpack(kept: Tensor | tuple[_Function, Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        function, given = kept
        with torch.no_grad():
            return function(given)

    def forward(original: _Function, function: _Function, repeat: bool, given: Tensor) -> Tensor:
        if not (given.requires_grad and torch.is_grad_enabled()):
            return original(given)
        if repeat:
            output: Tensor = checkpoint(function, given, use_reentrant=False, preserve_rng_state=False)
        else:
            output = function(given)
        made[output.grad_fn] = function, given.detach()
        return output

    for module in modules:
        function = partial(F.gelu, approximate="tanh") if isinstance(module, _TANH_GELU) else module.forward
        repeat = not isinstance(module, (*_ONE_FUNCTION, *_TANH_GELU))
        module.forward = partial(forward, module.forward, function, repeat)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for module in modules:
            del module.forward
