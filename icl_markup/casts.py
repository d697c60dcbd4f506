"""Weights that are cast for autocast once, and not in every step.

Autocast keeps the casts of weights that are trained, for one pass. Frozen weights it casts each time they are used, and
the backward pass keeps that cast. While tags are trained these casts are made once instead: no more memory at the
peak of a step, the same bits, and a pass over all weights less in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icl_markup.backbone import Backbone
from icl_markup.loading import DTYPES


@contextmanager
def cast_once(backbone: Backbone) -> Iterator[int]:
    """While active, frozen linear layers keep their weights in the type of the backbone's autocast, beside their own.

    Outside autocast they compute as ever. Does nothing for a backbone without autocast, or whose layers are split over
    processes. The weights must not change.

    Yields:
        The bytes of the casts.
    """
    layers: list[nn.Linear] = []
    if backbone.precision != "none" and not backbone.is_sharded:  # copies would bring whole layers back
        head = backbone.model.get_output_embeddings()  # is read for candidates alone, in fp32
        layers = [m for m in backbone.model.modules() if type(m) is nn.Linear and m is not head and _is_plain(m)]
    casts: list[Tensor] = []
    for layer in layers:
        dtype = DTYPES[backbone.precision]
        weight = layer.weight.to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        casts += [weight] if bias is None else [weight, bias]
        layer.forward = partial(_forward, layer, weight, bias)  # type: ignore[method-assign]
    try:
        yield sum(cast.numel() * cast.element_size() for cast in casts)
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer is frozen, in fp32, and nobody else has put a function in the place of its own."""
    if "forward" in vars(layer):
        return False
    return layer.weight.dtype == torch.float32 and not any(p.requires_grad for p in layer.parameters())


def _forward(layer: nn.Linear, weight: Tensor, bias: Tensor | None, given: Tensor) -> Tensor:
    kind = given.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == weight.dtype:
        return F.linear(given, weight, bias)
    return F.linear(given, layer.weight, layer.bias)
