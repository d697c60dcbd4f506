"""Which implementation of attention computes a batch: one kernel (``sdpa``), or step by step (``eager``).

On CPUs the kernel is as fast or faster, up to ten times for long prompts, with one exception: under bf16 autocast its
backward pass takes longer for short prompts, up to twice as long. Measured by ``scripts/bench_attention.py``
(``results/bench/attention.jsonl``): causal and masked models, heads of 32 to 128, prompts of 64 to 2,048 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from icl_markup.errors import BackboneError

SHORT = 192
"""Prompts of fewer tokens train faster step by step in bf16 on a CPU: at 128 by a tenth to a half, at 256 by less than
a tenth or not at all."""


def trains_faster_eager(device: torch.device, precision: str, length: int) -> bool:
    """Return whether prompts of so many tokens train faster with attention computed step by step."""
    return device.type == "cpu" and precision == "bf16" and length < SHORT


def can_switch(model: PreTrainedModel) -> bool:
    """Return whether a model takes another implementation at any time; old ones in transformers do not.

    Nor do models of several parts here, each of which may have an implementation of its own.
    """
    known = getattr(model, "_can_set_attn_implementation", None)
    if getattr(model.config, "sub_configs", None):
        return False
    return model.config._attn_implementation == "sdpa" and known is not None and bool(known())


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """While active, a model's attention is computed step by step, so that there are weights to tell.

    Raises:
        BackboneError: the model cannot change how it computes attention.
    """
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        raise BackboneError(f"{type(model).__name__} tells no attention: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
