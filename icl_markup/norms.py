"""Root-mean-square norms in fewer passes over memory, while tags are trained on a CPU.

transformers writes these norms (Zhang and Sennrich 2019, arXiv 1910.07467) out in Python, as half a dozen operations
forwards and more backwards, each of which reads and writes all states. Here rows are taken in blocks that stay in the
caches, and the gradient is computed by its closed form: with y = w x / r and r = sqrt(mean(x²) + ε),

    dL/dx = (w g - x mean(w g x) / r²) / r        for g = dL/dy.

Outputs are the same to the bit, gradients to rounding. Under autocast in bf16, which rounds gradients to bf16 at the
next linear layer in any case, states are kept for the backward pass in bf16, which is half the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from icl_markup.backbone import Backbone

_BLOCK = 2**16
"""Elements of a block: a quarter of a MiB, of which a handful fit the second cache."""

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def fast_norms(backbone: Backbone) -> Iterator[int]:
    """While active, frozen root-mean-square norms in fp32 pass gradients on in fewer passes over memory.

    Does nothing for a backbone that is not on a CPU; without gradients norms compute as ever. Which modules are such
    norms is found by comparing what their class computes.

    Yields:
        How many norms that is.
    """
    norms: list[nn.Module] = []
    known: dict[Any, float | None] = {}
    try:
        for module in backbone.model.modules() if backbone.runs_on_cpu and not backbone.is_sharded else ():
            offset = _offset(module, known)
            if offset is not None:
                module.forward = partial(_forward, module.forward, module, offset)
                norms.append(module)
        yield len(norms)
    finally:
        for module in norms:
            del module.forward


def _forward(original: Callable[..., Tensor], module: nn.Module, offset: float, *given: Any, **named: Any) -> Tensor:
    states = given[0] if len(given) == 1 and not named else None  # some take a gate as well, or None for it
    if not isinstance(states, Tensor) or states.dtype != torch.float32:
        return original(*given, **named)
    if not (states.requires_grad and torch.is_grad_enabled()):
        return original(states)
    output: Tensor = _Norm.apply(states, _scale(module, offset), _epsilon(module))
    return output


def _offset(module: nn.Module, known: dict[Any, float | None]) -> float | None:
    """Return what a norm adds to its weights (Gemma's 1, others' 0), or None for a module that is no such norm."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or "forward" in vars(module) or _epsilon(module) is None:
        return None
    weight = parameters["weight"]
    if weight.ndim != 1 or weight.dtype != torch.float32 or weight.requires_grad or list(module.buffers()):
        return None
    kind = (type(module), _epsilon(module), len(weight))
    if kind not in known:
        known[kind] = next((offset for offset in (0.0, 1.0) if _computes(module, offset)), None)
    return known[kind]


def _computes(module: nn.Module, offset: float) -> bool:
    """Whether a module of this class, with random weights and states, computes what is computed here."""
    twin: Any = copy.copy(module)
    width = len(twin.weight)
    generator = torch.Generator().manual_seed(0)
    twin._parameters = {"weight": nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)}
    states = torch.randn(3, 5, width, generator=generator)
    try:
        with torch.no_grad():
            expected = type(module).forward(twin, states)
    except Exception:  # a class that nobody has seen here may need anything else, and say so in any way
        return False
    found = _Norm.apply(states, _scale(twin, offset), _epsilon(twin))
    return isinstance(expected, Tensor) and torch.equal(expected, found)


def _epsilon(module: nn.Module) -> Any:
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if found else None


def _scale(module: nn.Module, offset: float) -> Tensor:
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight + offset if offset else weight


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of equally many rows into blocks of rows, side by side."""
    rows = max(1, _BLOCK // tensors[0].shape[-1])
    return zip(*(tensor.view(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)


def _rounds_to_bf16(states: Tensor) -> bool:
    """Whether linear layers around a norm compute in bf16."""
    kind = states.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


class _Norm(torch.autograd.Function):
    """y = scale x / sqrt(mean(x²) + ε) over the last dimension; the scale has no gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        states = states.contiguous()
        output = torch.empty_like(states)
        inverse = states.new_empty(*states.shape[:-1], 1)
        for x, y, r in _blocks(states, output, inverse):
            torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add_(epsilon), out=r)
            torch.mul(x, r, out=y).mul_(scale)
        ctx.save_for_backward(states.bfloat16() if _rounds_to_bf16(states) else states, inverse, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        states, inverse, scale = ctx.saved_tensors
        width = states.shape[-1]
        result = torch.empty_like(states, dtype=torch.float32)
        for kept, r, g, d in _blocks(states, inverse, gradients[0].contiguous(), result):
            x, scaled = kept.float(), g * scale
            along = (scaled * x).sum(-1, keepdim=True)
            torch.mul(scaled, r, out=d).addcmul_(x, along * r.pow(3) / -width)
        return result, None, None
