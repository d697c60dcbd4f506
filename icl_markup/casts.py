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
def cast_once(backbone: Backbone) -> Iterator[None]:
    """While active, frozen linear layers keep their weights in the type of the backbone's autocast, beside their own.

    Outside autocast they compute as ever. Does nothing for a backbone without autocast, or whose
    layers are split over processes. The weights must not change.
    """
    layers: list[nn.Linear] = []
    if backbone.precision != "none" and not backbone.is_sharded:  # copies would bring whole layers back
        layers = [m for m in backbone.model.modules() if type(m) is nn.Linear and _is_frozen(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer, DTYPES[backbone.precision], {})  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_frozen(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and not any(p.requires_grad for p in layer.parameters())


def _forward(layer: nn.Linear, dtype: torch.dtype, kept: dict[str, Tensor | None], given: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(given.device.type) or torch.get_autocast_dtype(given.device.type) != dtype:
        return F.linear(given, layer.weight, layer.bias)
    if not kept:  # at first use, so that a layer that is never used costs nothing
        with torch.inference_mode(False), torch.no_grad():  # validation may use it first, in inference mode
            kept["weight"] = layer.weight.to(dtype)
            kept["bias"] = None if layer.bias is None else layer.bias.to(dtype)
    weight = kept["weight"]
    assert weight is not None
    return F.linear(given, weight, kept["bias"])
