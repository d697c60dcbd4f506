"""Sketches of weights: a few numbers by which two models are compared that were rounded differently.

A sketch is what a table or layer gives for random signs, in groups. Its difference between two models, as a share of
its norm, is on average that of the weights themselves: about 1.4 for two unrelated models of one shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from icl_markup.quantisation import linear_layers, projection, signs
from icl_markup.sharded import whole

Sketch = tuple[tuple[float, ...], tuple[float, ...]]
"""Values and the norms that they are measured by, both of one length; both are empty where there is no sketch."""

LINEAR_GROUPS = 32
EMBEDDING_GROUPS = 64
_EMBEDDING_SEED = 1_000_003
_BLOCK = 8192

_SAME = 0.02
"""What rounding to bf16 or fp16 may change."""

_COARSE = 0.3
_TOLERANCE = {"none": _SAME, "bitsandbytes-int8": 0.1, "torchao-int8": 0.1}
_GGUF_TOLERANCE = {8: 0.02, 6: 0.06, 5: 0.12, 4: 0.2, 3: 0.35, 2: 0.6}
"""By bits. Measured on SmolLM2: 0.006 (Q8_0), 0.04 to 0.07 (Q5_0, Q5_1), 0.09 to 0.16 (Q4_0, Q4_1); on Qwen2.5-Coder
between Q4_K and Q6_K 0.06 to 0.08. A bit less doubles the step, and so the difference."""


def tolerance(kinds: Iterable[str]) -> float:
    """Return by what share of its norm a sketch may differ between models held in these ways.

    Args:
        kinds: how they are held: a value of `Backbone.quantisation`, or ``gguf-`` and a type, such as ``gguf-q4_1``.
    """
    return max(map(_tolerance, kinds))


def _tolerance(kind: str) -> float:
    if not kind.startswith("gguf-"):
        return _TOLERANCE.get(kind, _COARSE)
    if kind == "gguf-f16":
        return _SAME
    bits = re.search(r"\d", kind)
    return _GGUF_TOLERANCE.get(int(bits[0]) if bits else 0, max(_GGUF_TOLERANCE.values()))


def difference(mine: Sketch, theirs: Sketch) -> float:
    """Return the root mean square of two sketches' difference, as a share of their norms; infinite for damaged ones."""
    if len({*map(len, mine), *map(len, theirs)}) != 1:
        return math.inf
    pairs, norms = zip(mine[0], theirs[0], strict=True), zip(mine[1], theirs[1], strict=True)
    shares = [
        ((a - b) / max(*norm)) ** 2 for (a, b), norm in zip(pairs, norms, strict=True) if max(norm) > 0
    ]  # of models with few layers some groups are empty
    return math.sqrt(sum(shares) / max(len(shares), 1))


@torch.no_grad()
def embedding_sketch(table: Tensor) -> Sketch:
    """Return the sketch of an embedding table, (rows, width); it is read once, row block by row block."""
    sides = signs(1, len(table), _EMBEDDING_SEED)[0]
    columns = signs(1, table.shape[1], _EMBEDDING_SEED + 1)[0].to(table.device)
    products = torch.cat([(block.float() @ columns).cpu() for block in table.split(_BLOCK)]).double()
    groups = torch.arange(len(table)) % EMBEDDING_GROUPS
    sums = torch.zeros(EMBEDDING_GROUPS, dtype=torch.double).index_add_(0, groups, products * sides)
    squares = torch.zeros(EMBEDDING_GROUPS, dtype=torch.double).index_add_(0, groups, products**2)
    return _rounded(sums.tolist(), squares.tolist())


@torch.no_grad()
def linear_sketch(model: torch.nn.Module, dtype: torch.dtype) -> Sketch:
    """Return the sketch of a model's linear layers, read off what they compute, in the type that they compute in."""
    sums, squares = [0.0] * LINEAR_GROUPS, [0.0] * LINEAR_GROUPS
    for index, (_, module, width) in enumerate(linear_layers(model)):  # type: ignore[arg-type]
        value, norm = projection(module, width, dtype, 2 * index)
        sums[index % LINEAR_GROUPS] += value
        squares[index % LINEAR_GROUPS] += norm**2
    return _rounded(sums, squares)


@torch.no_grad()
def weight_norms(model: torch.nn.Module) -> tuple[float, ...]:
    """Return the norms of all weights in 32 groups."""
    squares = [0.0] * LINEAR_GROUPS
    for index, parameter in enumerate(model.parameters()):
        squares[index % LINEAR_GROUPS] += float(torch.linalg.vector_norm(whole(parameter), dtype=torch.float32)) ** 2
    return tuple(round(math.sqrt(square), 6) for square in squares)


def _rounded(sums: Iterable[float], squares: Iterable[float]) -> Sketch:
    return tuple(round(value, 6) for value in sums), tuple(round(math.sqrt(value), 6) for value in squares)
