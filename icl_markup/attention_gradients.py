"""The gradients of attention in bf16 on a CPU, in blocks of scores.

PyTorch's kernel for CPUs is fast forwards, but its backward pass in bf16 takes five to ten times as long. Here the
backward pass is a handful of matrix products over blocks of scores so small that they stay in the second cache. Scores
are computed again from queries and keys, so that neither they nor the output are kept (Dao et al. 2022, arXiv
2205.14135, section 3.1). With P = softmax(S) and a scale s,

    dV = Pᵀ dO,    dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)),    dQ = dS K s,    dK = dSᵀ Q s,    S = s Q Kᵀ + masks.

A relative position bias (T5's) is added block by block, and never kept for each prompt or layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 2**19
"""Scores of a block: 1 MiB in bf16, of which the three that are alive together fit the second cache or nearly so."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    lengths: Sequence[int] | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attend, by PyTorch's kernel forwards and in blocks backwards.

    Args:
        query: (prompts, heads, queries, width of a head), in bf16.
        key: (prompts, heads, keys, width of a head).
        value: the same shape.
        mask: what is added to scores, or bool, true where a query sees a key, (prompts or 1, heads or 1, queries or 1,
            keys); it has no gradient.
        bias: what is added besides, (1, heads, queries, keys); it has no gradient.
        lengths: how many keys each prompt has, instead of a mask; None: all.
        is_causal: whether queries see keys up to their own position, instead of a mask.
        scale: what products of queries and keys are multiplied by.

    Returns:
        (prompts, heads, queries, width of a head).
    """
    output: Tensor = _Attention.apply(query, key, value, mask, bias, lengths, is_causal, scale)
    return output


class _Attention(torch.autograd.Function):
    """Attention in bf16; masks and biases have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        lengths: Sequence[int] | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask, bias)
        ctx.lengths, ctx.is_causal, ctx.scale = lengths, is_causal, scale
        if bias is None:
            if lengths is not None:
                mask = query.new_zeros(len(query), 1, 1, key.shape[2])
                _hide(mask, lengths)
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
        added = _Added.of(mask, bias, lengths, is_causal, query, key)
        shape = (1, query.shape[1], query.shape[2], key.shape[2])
        outputs = []
        for some, total in added.totals(len(query), shape):
            outputs.append(F.scaled_dot_product_attention(query[some], key[some], value[some], total, scale=scale))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, bias = ctx.saved_tensors
        added = _Added.of(mask, bias, ctx.lengths, ctx.is_causal, query, key)
        rows, keys = query.shape[2], key.shape[2]
        given = [one.contiguous() for one in (query * ctx.scale, key, value, added.without_blind(gradients[0]))]
        found = [_as_layers_have_them(one) for one in given[:3]]
        for prompts, heads in blocks_of_heads(query.shape[0], query.shape[1], rows * keys):
            shape = (prompts.stop - prompts.start, heads.stop - heads.start, rows, keys)
            q, k, v, g = (one[prompts, heads].flatten(0, 1) for one in given)
            scores = added.scores(q, k, prompts, heads, shape).flatten(0, 1)
            parts = gradients_of_heads(q, k, v, g, scores)
            for one, part in zip(found, parts, strict=True):
                one[prompts, heads] = part.view(*shape[:2], *part.shape[1:])
        return found[0].mul_(ctx.scale), found[1], found[2], None, None, None, None, None


def _as_layers_have_them(given: Tensor) -> Tensor:
    """Return an empty tensor of the same shape, in which a token's heads lie side by side."""
    return torch.empty_like(given.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def gradients_of_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries (scaled ones), keys and values, given that of the output, and the scores.

    All are (heads, length, width of a head), scores (heads, queries, keys); these are written over.
    """
    weights = torch.softmax(scores, -1)
    torch.bmm(g, v.transpose(1, 2), out=scores)
    towards = torch.ops.aten._softmax_backward_data(scores, weights, -1, weights.dtype)
    return (
        torch.bmm(towards, k),
        torch.bmm(towards.transpose(1, 2), q),
        torch.bmm(weights.transpose(1, 2), g),
    )


def blocks_of_heads(prompts: int, heads: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of heads, of so many scores each: all of several prompts, or some of one prompt's."""
    most = max(1, _BLOCK // scores)
    several = most // heads
    for prompt in range(0, prompts, max(1, several)):
        if several:
            yield slice(prompt, min(prompts, prompt + several)), slice(0, heads)
        else:
            for head in range(0, heads, most):
                yield slice(prompt, prompt + 1), slice(head, min(heads, head + most))


class _Added(NamedTuple):
    """What is added to scores: parts of shape (prompts or 1, heads or 1, queries or 1, keys), in the type of scores.

    Attributes:
        parts: a mask, such as 0 where a query sees a key and the least number where not, and a relative position bias.
        lengths: the lengths of prompts, where there is no mask; keys beyond are hidden. None: nothing is padded, or the
            mask says what.
        seeing: which queries see any key; None: all.
    """

    parts: tuple[Tensor, ...]
    lengths: Sequence[int] | None
    seeing: Tensor | None

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        bias: Tensor | None,
        lengths: Sequence[int] | None,
        is_causal: bool,
        query: Tensor,
        key: Tensor,
    ) -> _Added:
        least, seeing, parts = torch.finfo(query.dtype).min, None, []
        if is_causal:
            parts.append(query.new_full((1, 1, query.shape[2], key.shape[2]), least).triu_(1))
        elif mask is not None:
            mask = _slim(mask)
            if mask.dtype == torch.bool:
                seeing = mask.any(-1, keepdim=True)
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, least)
            else:
                seeing = mask.amax(-1, keepdim=True) != float("-inf")
                mask = mask.to(query.dtype).clamp(min=least)
            parts.append(mask)
        if bias is not None:
            parts.append(_slim(bias).to(query.dtype))
        return cls(tuple(parts), lengths, seeing)

    def total(self, prompts: slice, heads: slice, shape: tuple[int, ...]) -> Tensor:
        """Return the sum of the parts for some heads, of this shape: (prompts, heads, queries, keys)."""
        parts = [_block_of(part, prompts, heads) for part in self.parts]
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1]).expand(shape)

    def totals(self, prompts: int, shape: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Yield prompts and what is added to the scores of each, of this shape; it holds until the next are asked for.

        That is prompt by prompt where prompts differ, as it is as large as the scores of all of a prompt's heads.
        """
        heads = slice(0, shape[1])
        if all(part.shape[0] == 1 for part in self.parts):
            total = self.total(slice(0, 1), heads, shape)
            if self.lengths is None:
                yield slice(0, prompts), total
                return
            shown, hiding = shape[3], total.clone()
            for row, length in enumerate(self.lengths):  # these differ by little, as batches are sorted
                hiding[..., shown:length] = total[..., shown:length]
                hiding[..., length:shown] = torch.finfo(total.dtype).min
                shown = min(length, shape[3])
                yield slice(row, row + 1), hiding
        else:
            for row in range(prompts):
                yield slice(row, row + 1), self.total(slice(row, row + 1), heads, shape)

    def scores(self, query: Tensor, key: Tensor, prompts: slice, heads: slice, shape: tuple[int, ...]) -> Tensor:
        """Return the scores of some heads, of this shape; queries and keys are (heads, length, width of a head)."""
        if self.parts:
            total = self.total(prompts, heads, shape).flatten(0, 1)
            scores = torch.baddbmm(total, query, key.transpose(1, 2)).view(shape)
        else:
            scores = torch.bmm(query, key.transpose(1, 2)).view(shape)
        if self.lengths is not None:
            _hide(scores, self.lengths[prompts])
        return scores

    def without_blind(self, gradient: Tensor) -> Tensor:
        """Return gradients of the output without those of queries that see nothing, which depend on no key."""
        return gradient if self.seeing is None else gradient * self.seeing


def _hide(scores: Tensor, lengths: Sequence[int]) -> None:
    """Hide keys beyond the lengths of prompts, in place; scores are (prompts, ..., keys)."""
    for one, length in zip(scores, lengths, strict=True):
        one[..., length:] = torch.finfo(scores.dtype).min


def _block_of(tensor: Tensor, prompts: slice, heads: slice) -> Tensor:
    """Return what belongs to some heads; a dimension of one belongs to all."""
    everything = slice(None)
    return tensor[prompts if tensor.shape[0] > 1 else everything, heads if tensor.shape[1] > 1 else everything]


def _slim(tensor: Tensor) -> Tensor:
    """Return a tensor with each dimension along which it was expanded cut to one."""
    for place, (size, step) in enumerate(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)):
        if size > 1 and step == 0:
            tensor = tensor.narrow(place, 0, 1)
    return tensor
