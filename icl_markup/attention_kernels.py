"""Which implementation of attention computes a batch.

PyTorch's kernel (``sdpa``) is as fast as attention step by step (``eager``) or faster, up to six times for long
prompts, with one exception: in bf16 on a CPU its backward pass is slow, and `blocked_attention` takes its place.
Measured by ``scripts/bench_attention.py`` (``results/bench/attention.jsonl``): causal and masked models, heads of 32 to
128, prompts of 64 to 2,048 tokens.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

from torch import Tensor
from transformers import PreTrainedModel

from icl_markup.blocked_attention import BLOCKED, padded_to_the_right
from icl_markup.errors import BackboneError


def can_switch(model: PreTrainedModel) -> bool:
    """Return whether a model takes another implementation at any time; old ones in transformers do not.

    Nor do models of several parts here, each of which may have an implementation of its own, and models that do
    something else where theirs has another name (sparse attention does).
    """
    known = getattr(model, "_can_set_attn_implementation", None)
    if known is None or getattr(model.config, "sub_configs", None) or _asks_for_sdpa(type(model).__module__):
        return False
    return model.config._attn_implementation in ("sdpa", BLOCKED) and bool(known())


@cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether the source of a model's module compares the name of its implementation; true if nobody can tell."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return re.search(r"_attn_implementation\b[^\n]*[\"\']sdpa[\"\']", source) is not None


@contextmanager
def blocked(model: PreTrainedModel, attention_mask: Tensor | None) -> Iterator[None]:
    """While active, a model's attention is computed in blocks where it is trained in bf16 on a CPU.

    Args:
        model: the model.
        attention_mask: the mask of padding that it is given, (prompts, longest), on the CPU; None: nothing is padded.
    """
    with _switched(model, BLOCKED), padded_to_the_right(attention_mask):
        yield


def eager(model: PreTrainedModel) -> AbstractContextManager[None]:
    """While active, a model's attention is computed step by step, so that there are weights to tell.

    Raises:
        BackboneError: the model cannot change how it computes attention.
    """
    return _switched(model, "eager")


@contextmanager
def _switched(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"{type(model).__name__} cannot compute attention by {name!r}: {reason}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
