"""Where tags lie among the embeddings of the vocabulary: neighbours, norms, similarities, main directions.

Embeddings of a language model share a large common part, so that any two of them have a positive cosine. Similarities
between tags are therefore taken after subtracting the vocabulary's mean, which leaves unrelated rows near 0
(Mu & Viswanath 2018, arXiv 1702.01417). Neighbours are those by the plain cosine, or the plain dot product, which is
what a layer computes but favours long rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float64]
Measure = Literal["cosine", "dot"]

MOST_FITTED = 20_000
"""Rows of the vocabulary that main directions are computed from, drawn with a fixed seed where there are more."""


def nearest(rows: Tensor, table: Tensor, count: int, measure: Measure = "cosine") -> tuple[Tensor, Tensor]:
    """Return the nearest rows of a table, nearest first; of equally near ones, the first in the table.

    Args:
        rows: shape (rows, width).
        table: shape (vocabulary, width).
        count: how many; as many as there are, if there are fewer.
        measure: the cosine, or the dot product.

    Returns:
        Values, fp32, and indices into `table`, each (rows, count).
    """
    rows = F.normalize(rows.float(), dim=1) if measure == "cosine" else rows.float()
    values = []
    for block in table.split(8192):  # no second copy of a large table
        others = F.normalize(block.float(), dim=1) if measure == "cosine" else block.float()
        values.append(rows @ others.T)
    found = torch.cat(values, dim=1).sort(dim=1, descending=True, stable=True)
    return found.values[:, :count], found.indices[:, :count]


def norm_percentiles(rows: Tensor, table: Tensor) -> Tensor:
    """Return the percentage of a table's rows that are shorter than each row, fp64, (rows,)."""
    norms = table.float().norm(dim=1).sort().values
    below = torch.searchsorted(norms, rows.float().norm(dim=1))
    return 100 * below.double() / len(norms)


def similarities(first: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """Return cosines after subtracting `mean`, (width,), from both: fp32, (first, second)."""
    return F.normalize(first.float() - mean, dim=1) @ F.normalize(second.float() - mean, dim=1).T


@dataclass(frozen=True)
class Agreement:
    """How alike two warm-ups' tags are.

    Attributes:
        tags: the similarity of each tag in one to itself in the other: the mean over its soft tokens, in order.
        same: the mean over tags.
        others: the mean similarity of a tag in one to every other tag in the other, soft token by soft token: what
            `same` is to be compared with; nan where there is one tag.
    """

    tags: dict[str, float]
    same: float
    others: float


def agreement(first: Mapping[str, Tensor], second: Mapping[str, Tensor], mean: Tensor) -> Agreement:
    """Compare the tags that two warm-ups have in common, aligned by name.

    Args:
        first: rows by tag name, each (width of the tag, embedding width).
        second: others. Of a tag that has more soft tokens in one than in the other, those are compared that both have.
        mean: the vocabulary's mean row, (embedding width,).

    Returns:
        The agreement; without any tag in common its means are nan.
    """
    names = [name for name in first if name in second]
    own, others = {}, []
    for one in names:
        for other in names:
            width = min(len(first[one]), len(second[other]))
            found = similarities(first[one][:width], second[other][:width], mean)
            if one == other:
                own[one] = found.diagonal().mean().item()
            else:
                others.append(found.mean().item())
    nan = float("nan")
    return Agreement(own, float(np.mean(list(own.values()))) if own else nan, float(np.mean(others)) if others else nan)


def agreements(warmups: Sequence[Mapping[str, Tensor]], mean: Tensor) -> dict[tuple[int, int], Agreement]:
    """Compare every two of several warm-ups; keys are their places in the sequence."""
    return {(i, j): agreement(warmups[i], warmups[j], mean) for i, j in combinations(range(len(warmups)), 2)}


@dataclass(frozen=True)
class Plane:
    """Two directions, and what they explain.

    Attributes:
        origin: the point that directions begin at, (width,).
        axes: two orthonormal directions, (2, width).
        explained: the share of the variance of what they were fitted to that lies along each, (2,).
    """

    origin: Floats
    axes: Floats
    explained: Floats

    def __call__(self, rows: Tensor | Floats) -> Floats:
        """Return the coordinates of rows, (rows, width), in the plane: (rows, 2)."""
        return (np.asarray(rows, dtype=np.float64) - self.origin) @ self.axes.T


def main_plane(rows: Tensor, seed: int = 0) -> Plane:
    """Return the plane of the first two principal components of rows, (rows, width), at least 3 of them.

    The same rows give the same plane: signs are such that the largest loading of each direction is positive.
    """
    data = np.asarray(sample(rows, MOST_FITTED, seed), dtype=np.float64)
    found = PCA(n_components=2, random_state=seed).fit(data)
    largest = np.abs(found.components_).argmax(axis=1)
    signs = np.sign(found.components_[range(2), largest])
    return Plane(found.mean_, found.components_ * signs[:, None], found.explained_variance_ratio_)


def sample(rows: Tensor, most: int, seed: int = 0) -> Tensor:
    """Return at most so many rows, drawn without replacement, in their order; the same each time."""
    if len(rows) <= most:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
    return rows[chosen.sort().values]
