"""Attention within segments, computed for segments alone.

A mask over whole prompts (`segments.visible`) leaves most scores out: a token of a local layer sees the few tokens of
its segment and of the head. Here segments are gathered into rows, each with the keys of its prompt's head, so that the
cost grows with a prompt's length and not with its square. Rows of similar length stand together. Used where attention
is trained in blocks (`blocked_attention`), unless heads are so long that their copies outweigh what is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from icl_markup.attention_gradients import blocks_of_heads, gradients_of_heads
from icl_markup.blocked_attention import MULTIPLE, rounded_up

_MOST_COPIES, _SPARE = 4, 2**12
"""Keys of rows for each token of the batch at most, and how many more in small batches, whose rows are rounded up."""


@dataclass(frozen=True)
class _Rows:
    """Segments with at most so many keys.

    Attributes:
        queries: where their tokens are among those of all rows.
        keys: where their keys are among those of all rows: in each row the head's, then the segment's own.
        prompts: the prompt of each segment, (segments,).
        mask: what is added to scores, in bf16, (segments, 1, 1, keys of a row).
    """

    queries: slice
    keys: slice
    prompts: Tensor
    mask: Tensor

    def each(self, given: Tensor, where: slice, heads: int) -> Tensor:
        """Return vectors of all rows as those of these segments' heads, (segments, heads, length, width of a head)."""
        return given[where].view(len(self.prompts), -1, heads, given.shape[-1] // heads).transpose(1, 2)


@dataclass(frozen=True)
class SegmentBlocks:
    """The segments of a batch, in rows. Tokens are numbered through all prompts, padding included.

    Attributes:
        rows: the segments by their number of keys.
        queries: the token of each place in all rows, one after the other; 0 where a segment has no more.
        exists: whether it has, the same length, then 1.
        keys: likewise for keys.
        back: the place of each token; for padding one that nothing is in.
        back_of_keys: likewise for keys.
        heads: the tokens of each prompt's head, (prompts, most), 0 where it has no more.
    """

    rows: tuple[_Rows, ...]
    queries: Tensor
    exists: Tensor
    keys: Tensor
    back: Tensor
    back_of_keys: Tensor
    heads: Tensor

    @property
    def pays(self) -> bool:
        """Whether rows hold no more than a few times the tokens, copies of heads with them."""
        return len(self.keys) <= _MOST_COPIES * len(self.back) + _SPARE

    @classmethod
    def of(cls, segments: Tensor, head: int, padding: int) -> SegmentBlocks:
        """Find the segments.

        Args:
            segments: the segment of each token, (prompts, longest), on the CPU.
            head: the segment that all of a prompt see.
            padding: the segment of padding, which is computed nowhere.
        """
        flat = segments.numpy().ravel()
        tokens = np.flatnonzero(flat != padding)
        prompts = tokens // segments.shape[1]
        order = np.lexsort((tokens, flat[tokens], prompts))
        tokens, prompts = tokens[order], prompts[order]
        parts = flat[tokens]
        begins = np.flatnonzero(np.r_[True, (parts[1:] != parts[:-1]) | (prompts[1:] != prompts[:-1])])
        counts = np.diff(np.r_[begins, len(tokens)])
        owner, is_head = prompts[begins], parts[begins] == head
        head_counts = np.zeros(len(segments), dtype=np.int64)
        head_counts[owner[is_head]] = counts[is_head]
        most = int(head_counts.max())
        heads = np.zeros((len(segments), most), dtype=np.int64)
        heads[owner[is_head]] = _filled(tokens, begins[is_head], counts[is_head], most)
        sizes = np.array([_size(count + most) for count in counts])
        rows, queries, keys, exists, is_own = [], [], [], [], []
        first = first_key = 0
        for size in np.unique(sizes):
            which = np.flatnonzero(sizes == size)
            # Shapes recur (`MULTIPLE`), and one row at least is nobody's.
            which = np.r_[which, np.full(1 + (-1 - len(which)) % MULTIPLE, -1)]
            count = np.where(which < 0, 0, counts[which])
            prompt = np.where(which < 0, 0, owner[which])
            seen = np.where((which < 0) | is_head[which], 0, head_counts[prompt])
            own = _filled(tokens, begins[which], count, int(size) - most)
            has = np.arange(own.shape[1]) < count[:, None]
            hidden = np.concatenate([np.arange(most) >= seen[:, None], ~has], axis=1)
            mask = torch.zeros(len(which), 1, 1, int(size), dtype=torch.bfloat16)
            mask.masked_fill_(torch.from_numpy(hidden)[:, None, None], torch.finfo(mask.dtype).min)
            rows.append(
                _Rows(
                    slice(first, first + own.size),
                    slice(first_key, first_key + hidden.size),
                    torch.from_numpy(prompt),
                    mask,
                )
            )
            first, first_key = first + own.size, first_key + hidden.size
            queries.append(own.ravel())
            exists.append(has.ravel())
            keys.append(np.concatenate([heads[prompt], own], axis=1).ravel())
            is_own.append(np.concatenate([np.zeros((len(which), most), dtype=bool), has], axis=1).ravel())
        q, k = np.concatenate(queries), np.concatenate(keys)
        has_query, has_key = np.concatenate(exists), np.concatenate(is_own)
        back = np.full(flat.size, len(q) - 1)
        back[q[has_query]] = np.flatnonzero(has_query)
        back_of_keys = np.full(flat.size, len(k) - 1)
        back_of_keys[k[has_key]] = np.flatnonzero(has_key)
        indices = (torch.from_numpy(one) for one in (q, has_query[:, None], k, back, back_of_keys, heads))
        return cls(tuple(rows), *indices)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend within segments and to the head.

        Args:
            query: (prompts, heads, longest, width of a head), in bf16; keys and values are of this shape too.
            key: see there.
            value: see there.
            scale: what scores are multiplied by.

        Returns:
            The same shape; what stands where padding is means nothing.
        """
        output: Tensor = _Segments.apply(query, key, value, self, scale)
        return output


class _Segments(torch.autograd.Function):
    """Attention by rows of segments, and its gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: SegmentBlocks, scale: float) -> Tensor:
        heads = query.shape[1]
        q, k, v = _flat(query)[blocks.queries], _flat(key)[blocks.keys], _flat(value)[blocks.keys]
        found = [
            F.scaled_dot_product_attention(
                rows.each(q, rows.queries, heads),
                rows.each(k, rows.keys, heads),
                rows.each(v, rows.keys, heads),
                rows.mask,
                scale=scale,
            )
            for rows in blocks.rows
        ]
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale, ctx.shape = blocks, scale, query.shape
        return _unflat(torch.cat([_flat(one) for one in found])[blocks.back], query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks, shape = ctx.blocks, ctx.shape
        q, k, v = ctx.saved_tensors
        g = _flat(gradients[0])[blocks.queries].mul_(blocks.exists)
        q = q * ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in blocks.rows:
            given = [rows.each(one, where, shape[1]) for one, where in _with(rows, q, k, v, g)]
            found = [rows.each(one, where, shape[1]) for one, where in _with(rows, dq, dk, dv)]
            for some, heads in blocks_of_heads(len(rows.prompts), shape[1], given[0].shape[2] * given[1].shape[2]):
                queries, keys, values, towards = (one[some, heads].flatten(0, 1) for one in given)
                scores = torch.bmm(queries, keys.transpose(1, 2))
                scores.view(some.stop - some.start, -1, *scores.shape[1:]).add_(rows.mask[some])
                parts = gradients_of_heads(queries, keys, values, towards, scores)
                for one, part in zip(found, parts, strict=True):
                    one[some, heads] = part.view(some.stop - some.start, -1, *part.shape[1:])
        results = [dq.mul_(ctx.scale)[blocks.back], _of_keys(dk, blocks), _of_keys(dv, blocks)]
        return *(_unflat(one, shape) for one in results), None, None


def _with(rows: _Rows, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> list[tuple[Tensor, slice]]:
    """Return tensors, each with where the rows' part of it is."""
    pairs = [(q, rows.queries), (k, rows.keys), (v, rows.keys)]
    return pairs if g is None else [*pairs, (g, rows.queries)]


def _of_keys(given: Tensor, blocks: SegmentBlocks) -> Tensor:
    """Return tokens' gradients from those of keys: a segment's own; a head's, summed over a prompt's segments."""
    prompts, most = blocks.heads.shape
    sums = given.new_zeros(prompts, most, given.shape[-1], dtype=torch.float32)
    for rows in blocks.rows:
        parts = given[rows.keys].view(len(rows.prompts), -1, given.shape[-1])
        sums.index_add_(0, rows.prompts, parts[:, :most].float())
    result = given[blocks.back_of_keys]
    # Where a head has no more tokens another stands for one, but it was hidden there: zero is added to it.
    return result.index_add_(0, blocks.heads.flatten(), sums.flatten(0, 1).to(result.dtype))


def _flat(given: Tensor) -> Tensor:
    """Return vectors of heads, (prompts, heads, length, width), as those of tokens, (prompts times length, all)."""
    return given.transpose(1, 2).reshape(given.shape[0] * given.shape[2], -1)


def _unflat(given: Tensor, shape: torch.Size) -> Tensor:
    """Return vectors of tokens as those of heads."""
    return given.view(shape[0], shape[2], shape[1], -1).transpose(1, 2)


def _size(keys: int) -> int:
    """Return the number of keys of the rows in which segments with so many stand: twice as many at most."""
    if keys > 16 * MULTIPLE:
        return rounded_up(keys, 8 * MULTIPLE)
    size = MULTIPLE
    while size < keys:
        size *= 2
    return size


def _filled(tokens: np.ndarray, begins: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Return the tokens of groups, (groups, most), 0 beyond their number."""
    within = np.arange(most)
    index = np.minimum(begins[:, None] + within, len(tokens) - 1)
    found: np.ndarray = np.where(within < counts[:, None], tokens[index], 0)
    return found
