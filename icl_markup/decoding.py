"""Names in a sequence-to-sequence model: the encoder reads a prompt once, the decoder goes on with every name.

The decoder's first step computes the keys and values of what the encoder read. Each name of a prompt is given a copy of
them, as a row of one further step, so that it costs the computation of its own few tokens, and the copy's memory.
Gradients pass through the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from icl_markup.batching import Batch
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone


def decoder_states(
    backbone: Backbone, batch: Batch, tails: Sequence[Sequence[int]], owners: Sequence[int], table: TagTable | None
) -> tuple[Tensor, Tensor | None]:
    """Return what the head is given after the decoder's start token, and at each token of the names.

    Args:
        backbone: a sequence-to-sequence backbone whose decoder keeps a cache.
        batch: prompts; their slots are not read.
        tails: the ids of each name but its last, which predicts nothing; not empty.
        owners: the prompt of each.
        table: the tags' soft tokens.

    Returns:
        Shapes (prompts, hidden width) and (names, longest tail, hidden width); the second is None without names.
    """
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    inputs = {**backbone.inputs_of(batch), "past_key_values": cache, "use_cache": True}
    first, outputs = backbone.run(inputs, table)
    if not tails:
        return first[:, 0], None
    index = torch.tensor(owners, device=backbone.device)
    longest = max(map(len, tails))
    ids = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=backbone.device)
    further: dict[str, Any] = {
        # Keys and values of these states are in the cache; they are given for their shape.
        "encoder_outputs": BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state[index]),
        "attention_mask": batch.attention_mask.to(backbone.device)[index],
        "decoder_input_ids": ids,
        "past_key_values": EncoderDecoderCache(
            _chosen(cache.self_attention_cache, index), _chosen(cache.cross_attention_cache, index)
        ),
        "use_cache": True,
    }
    states, _ = backbone.run(further, None)
    return first[:, 0], states


def _chosen(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache with these rows of another."""
    chosen = DynamicCache()
    for layer in cache.layers:
        new = DynamicLayer()
        new.keys, new.values = layer.keys[rows], layer.values[rows]
        new.dtype, new.device, new.is_initialized = new.keys.dtype, new.keys.device, True
        chosen.layers.append(new)
    return chosen
