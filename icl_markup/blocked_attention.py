"""An implementation of attention for transformers, which trains in bf16 on a CPU in blocks (`attention_gradients`).

It takes what sdpa takes, and leaves to it what needs no gradient or another one, and long prompts. Measured by
``scripts/bench_attention.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icl_markup.attention_gradients import attend

BLOCKED = "icl_markup_blocked"
"""The name by which transformers knows this implementation."""

LONG = 1024
"""Prompts of so many tokens or more are left to PyTorch's kernel, which is as fast for them."""

MULTIPLE = 16
"""Prompts that are trained on in bf16 on a CPU are padded to a multiple of so many tokens.

PyTorch's products in bf16 are oneDNN's there, which makes a program for each shape when it first meets it: 6 ms for a
linear layer of 768 by 768, as much as four calls of it take. Lengths that recur need no new ones; and with keys that
are no multiple of 16 attention takes up to twice as long."""


def rounded_up(number: int, multiple: int = MULTIPLE) -> int:
    """Return the least multiple that is no less than a number."""
    return -(-number // multiple) * multiple


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' sdpa does; what needs no gradient, or another one, is left to it.

    Args:
        module: the layer of attention.
        query: (prompts, heads, queries, width of a head).
        key: (prompts, heads of keys, keys, width of a head); heads of queries are a multiple of these.
        value: the same shape.
        attention_mask: what is added to scores, or bool, true where a query sees a key; (prompts or 1, heads or 1,
            queries, keys).
        dropout: the probability of leaving a weight out.
        scaling: what scores are multiplied by; None: one over the root of the width.
        is_causal: whether queries see keys up to their own position, where no mask says what they see.
        position_bias: what is added to scores besides, (1, heads, queries, keys).
        **kwargs: what transformers passes on besides.

    Returns:
        The output, (prompts, queries, heads, width of a head), and None for weights.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    added = [one for one in (attention_mask, position_bias) if one is not None]
    unusual = any(kwargs.get(name) is not None for name in _UNUSUAL)
    plain = not (dropout or unusual or any(one.requires_grad for one in added))
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    fits = dtype == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] < LONG
    if not (plain and trained and fits):
        bias = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **bias, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    if is_causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast("cpu", enabled=False):
        lengths = _lengths(attention_mask, query.shape[2])
        output = attend(
            query,
            key,
            value,
            mask=attention_mask if lengths is None else None,
            bias=position_bias,
            lengths=lengths,
            is_causal=is_causal,
            scale=scale,
        )
    return output.transpose(1, 2).contiguous(), None


_UNUSUAL = ("cache", "softcap", "s_aux", "indices", "block_indices")
"""Arguments that change what is computed."""

AttentionInterface.register(BLOCKED, blocked_attention)
AttentionMaskInterface.register(BLOCKED, sdpa_mask)

_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)


@contextmanager
def padded_to_the_right(attention_mask: Tensor | None) -> Iterator[None]:
    """While active, prompts are known to be as long as a mask of padding says, (prompts, longest), on the CPU.

    Where a layer's own mask says nothing else, no mask is added to scores.
    """
    lengths = None
    if attention_mask is not None and attention_mask.ndim == 2 and bool((attention_mask.diff(dim=1) <= 0).all()):
        lengths = tuple(attention_mask.sum(1).tolist())
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def _lengths(mask: Tensor | None, rows: int) -> tuple[int, ...] | None:
    """Return the lengths of prompts, if a mask hides padding and nothing else."""
    lengths = _LENGTHS.get()
    if lengths is None or mask is None or mask.dtype != torch.bool or mask.shape != (len(lengths), 1, rows, rows):
        return None
    if min(lengths) == 0:
        return None
    if not isinstance(mask, FakeTensor):  # of which nobody can say what it holds
        keys = torch.arange(rows) < torch.tensor(lengths)[:, None]
        if not torch.equal(mask, keys[:, None, None].expand_as(mask)):
            return None
    return lengths
