"""What causal prompts begin with before their first tag: computed once a batch, and not for the gradient.

A token's states depend on what stands before it alone. Where a batch's prompts begin alike and the first tag comes
later (a system message and the start of a turn, or instructions in plain words), nothing of that beginning depends on
what is trained: its keys and values are computed for one prompt, without gradients, and all others go on from them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from icl_markup.batching import Batch

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

FEWEST = 16
"""Beginnings shorter than this are computed with the rest: copying their keys and values costs more than they do."""


def beginning_length(batch: Batch, first_tag_id: int) -> int:
    """Return how many ids all prompts of a batch begin with alike, before a tag or a slot; 0 where too few to matter.

    Args:
        batch: two prompts or more; of one, all before its first tag.
        first_tag_id: ids from this on are tags'.
    """
    ids = batch.input_ids
    varies = (ids != ids[:1]).any(0) | (ids >= first_tag_id).any(0) | (batch.attention_mask == 0).any(0)
    first = int(varies.to(torch.uint8).argmax()) if bool(varies.any()) else ids.shape[1]
    # A slot is read where it stands, so its own token must be among those computed.
    length = min(first, int(batch.positions.min()), ids.shape[1] - 1)
    return length if length >= FEWEST else 0


def without_beginning(batch: Batch, length: int) -> Batch:
    """Return a batch without the first ids of its prompts; its mask is that of whole prompts, as caches want it."""
    return replace(
        batch,
        input_ids=batch.input_ids[:, length:],
        positions=batch.positions - length,
    )


@torch.no_grad()
def computed(backbone: Backbone, ids: Tensor, prompts: int) -> DynamicCache:
    """Return a cache of the keys and values of `ids`, for so many prompts that begin with them.

    Args:
        backbone: a causal backbone that takes a cache (`Backbone.exactness`).
        ids: shape (ids,), none of them a tag's.
        prompts: how many go on from there; they share one copy until each layer adds its own to it.
    """
    cache = DynamicCache()
    inputs: dict[str, Any] = {"input_ids": ids[None].to(backbone.device), "past_key_values": cache, "use_cache": True}
    backbone.hidden_states(inputs)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(prompts, -1, -1, -1)
        layer.values = layer.values.expand(prompts, -1, -1, -1)
    return cache
