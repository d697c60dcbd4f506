"""The logarithm of a softmax's normalizer over the whole vocabulary, differentiable without keeping the vocabulary.

The gradient of log Z with regard to a hidden state is as small as the state itself. It is computed along with log Z, a
few states at a time, and kept instead of logits of the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOST_LOGITS = 2**24
"""Logits that are held at once: 64 MiB in fp32."""

Logits = Callable[[Tensor], Tensor]
"""From hidden states (states, hidden width) to fp32 logits (states, vocabulary)."""


def log_normalizer(hidden: Tensor, logits: Logits, vocabulary: int) -> Tensor:
    """Return the log of the sum of exponentiated logits of each state.

    Args:
        hidden: states, (states, hidden width).
        logits: computes their logits; nothing of it may need a gradient besides the states.
        vocabulary: how many logits a state has.

    Returns:
        fp32, (states,), differentiable once in `hidden`.
    """
    found: Tensor = _LogNormalizer.apply(hidden, logits, max(1, _MOST_LOGITS // vocabulary))  # type: ignore[no-untyped-call]
    return found


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _LogNormalizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Logits, most: int) -> Tensor:
        values, gradients = [], []
        for part in hidden.detach().split(most):
            if not ctx.needs_input_grad[0]:
                values.append(logits(part).logsumexp(-1))
                continue
            # What this small graph keeps is gone at once: hooks that move or count what a step keeps need not see it.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                given = part.detach().requires_grad_()
                value = logits(given).logsumexp(-1)
                value.sum().backward()  # not autograd.grad, in which hooks of torch's counters fail
            gradients.append(given.grad)
            values.append(value.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (kept,) = ctx.saved_tensors
        return (gradients[0][:, None] * kept).to(kept.dtype), None, None
