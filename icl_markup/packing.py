"""Prompts that begin alike, in one sequence: what they share is computed once, and each sees nothing of the others.

A tree is a beginning and its continuations, which may have continuations of their own. Trees stand one after the other
in a batch of one; positions go on from what a continuation continues, and a mask of attention lets each token see what
stands before it in its own prompt only. So the keys and values of a beginning are computed once, and never copied for
each prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from icl_markup.branches import BranchedSequence
from icl_markup.errors import BackboneError
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

TRUNK = -1


@dataclass(frozen=True)
class Prefix:
    """The first ids of a prompt, and the keys and values that a causal model computed for them.

    Attributes:
        ids: the ids, tags' among them.
        layers: each layer's keys and values, both of shape (1, heads, ids, head width). Nothing writes to them.
    """

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def bytes(self) -> int:
        """The bytes that keys and values take."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def head(self, length: int) -> Prefix:
        """Return the first ids alone, in causal models a prefix too; the tensors are views."""
        if length == len(self.ids):
            return self
        return Prefix(self.ids[:length], tuple((k[..., :length, :], v[..., :length, :]) for k, v in self.layers))


class Tree(NamedTuple):
    """Prompts that begin alike.

    Attributes:
        past: the part of the beginning that has been computed, or None.
        trunk: the ids of the rest of the beginning; none where all of it has been computed.
        branches: the ids of each continuation; none where only the beginning is wanted.
        parents: the number of the earlier branch that each one continues, or `TRUNK`; empty: all continue the trunk.
    """

    past: Prefix | None
    trunk: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    parents: tuple[int, ...] = ()

    @property
    def seen(self) -> int:
        """The number of ids that have been computed."""
        return 0 if self.past is None else len(self.past.ids)

    @property
    def tokens(self) -> int:
        """The number of ids that are still to be computed."""
        return len(self.trunk) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Grown:
    """A tree that was computed.

    Attributes:
        tree: the tree.
        trunk: what the model's head is given at the trunk's ids, (ids, hidden width).
        branches: the same for each branch.
        layers: keys and values of the whole sequence that the tree was part of.
        start: where its trunk stands in them.
    """

    tree: Tree
    trunk: Tensor
    branches: list[Tensor]
    layers: list[tuple[Tensor, Tensor]]
    start: int

    def prefix(self) -> Prefix:
        """Return past and trunk as one prefix, whose tensors share no memory with those of the sequence."""
        past, end = self.tree.past, self.start + len(self.tree.trunk)
        parts = [tuple(x[..., self.start : end, :] for x in layer) for layer in self.layers]
        before = [()] * len(parts) if past is None else past.layers
        layers = tuple(
            (torch.cat([*old[:1], keys], dim=-2), torch.cat([*old[1:], values], dim=-2))
            for old, (keys, values) in zip(before, parts, strict=True)
        )
        return Prefix((() if past is None else past.ids) + self.tree.trunk, layers)


def grow(backbone: Backbone, table: TagTable | None, trees: Sequence[Tree]) -> list[Grown]:
    """Compute trees in one sequence; only where gradients are off.

    Args:
        backbone: a causal backbone.
        table: the tags' soft tokens, if the ids hold any.
        trees: one tree or more, with one id or more to compute.

    Raises:
        BackboneError: the model does not keep one key and one value for each id and layer.
    """
    pasts = list({id(tree.past): tree.past for tree in trees if tree.past is not None}.values())
    roots = {id(past): number for number, past in enumerate(pasts)}
    sequence = BranchedSequence()
    root_of: list[int] = []  # for each id the past that it sees
    for tree in trees:
        trunk = sequence.add(tree.trunk, start=tree.seen)
        for branch, parent in zip(tree.branches, tree.parents or (TRUNK,) * len(tree.branches), strict=True):
            sequence.add(branch, trunk if parent == TRUNK else trunk + 1 + parent)
        root_of += [roots.get(id(tree.past), len(pasts))] * tree.tokens
    ids, device, seen = sequence.ids, backbone.device, sum(len(past.ids) for past in pasts)
    plain = len(trees) == 1 and len(trees[0].branches) + bool(trees[0].trunk) == 1
    if plain:  # an ordinary prompt: attention without a mask of its own is faster
        mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=device)
    else:
        columns = torch.tensor([n for n, past in enumerate(pasts) for _ in past.ids], dtype=torch.long)
        before = torch.tensor(root_of)[:, None] == columns
        mask = attention_mask(backbone, torch.cat([before, sequence.visible(len(ids))], dim=1)[None].to(device))
    cache = _cache(pasts)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([sequence.positions], device=device),
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }
    with _evaluating(backbone.model):
        hidden = backbone.hidden_states(inputs, table)[0]
    layers = [_content(layer, seen + len(ids)) for layer in cache.layers]
    if not layers:
        raise BackboneError(f"{type(backbone.model).__name__} does not fill the cache that it is given")
    grown, start = [], 0
    for tree in trees:
        parts = hidden[start : start + tree.tokens].split([len(tree.trunk), *map(len, tree.branches)])
        grown.append(Grown(tree, parts[0], list(parts[1:]), layers, seen + start))
        start += tree.tokens
    return grown


def attention_mask(backbone: Backbone, allowed: Tensor) -> Tensor:
    """Return which ids see which, bool (rows, ids, columns), in the form that the backbone's attention takes.

    That is (rows, 1, ids, columns): bool, or added to logits.
    """
    if attention_of(backbone) == "sdpa":
        return allowed[:, None]
    dtype = backbone.model.dtype
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def attention_of(backbone: Backbone) -> str:
    """Return the name of the implementation of attention that a backbone's model uses to answer."""
    return str(getattr(backbone.model.config.get_text_config(), "_attn_implementation", ""))


def takes_masks(backbone: Backbone) -> bool:
    """Return whether that implementation takes a mask that says of each two ids whether one sees the other."""
    return attention_of(backbone) in ("eager", "sdpa")


def _cache(pasts: Sequence[Prefix]) -> DynamicCache:
    """Return a cache that begins with these prefixes; what the model adds to it goes into tensors of its own."""
    cache = DynamicCache()
    for parts in zip(*(past.layers for past in pasts), strict=True):
        layer = DynamicLayer()
        keys, values = zip(*parts, strict=True)
        layer.keys = keys[0] if len(keys) == 1 else torch.cat(keys, dim=-2)
        layer.values = values[0] if len(values) == 1 else torch.cat(values, dim=-2)
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


def _content(layer: Any, length: int) -> tuple[Tensor, Tensor]:
    if type(layer) is not DynamicLayer or layer.keys is None or layer.keys.shape[-2] != length:
        raise BackboneError("a layer of the model keeps something else than one key and one value for each id")
    return layer.keys, layer.values


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode: layers that recompute activations in training mode take no cache then."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
