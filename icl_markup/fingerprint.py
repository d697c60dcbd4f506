"""Fingerprints of a backbone: is this the model that the tags were made for?

A model in another type, or quantised, is the same model. What is kept exactly is compared exactly; linear layers are
compared by what they compute from random signs, up to what rounding to so many bits changes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icl_markup.backbone import Backbone
from icl_markup.quantisation import linear_layers, projection
from icl_markup.sharded import whole

_SKETCH_ROWS = 64
_SKETCH_GROUPS = 32
_SKETCH_TOLERANCE = 0.02
"""Rows' norms of one table stored as fp32, bf16 or fp16 differ by less than this share."""

_LINEAR_TOLERANCE = {"none": 0.02, "bitsandbytes-int8": 0.1, "torchao-int8": 0.1}
"""By how much of their norm linear layers may differ; another model's differ by 1.4, 4-bit weights by about 0.1."""

_COARSE_TOLERANCE = 0.3


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a backbone.

    Attributes:
        kind: causal, seq2seq or masked.
        architecture: the model's class.
        embedding_shape: rows and width of the input embedding.
        embedding_dtype: the type it was hashed in.
        embedding_sha256: the hash of its bytes.
        embedding_sketch: norms of 64 evenly spaced rows, by which a table of another type is compared.
        weights_sha256: the hash of all weights, in the type that they are held in.
        weights_sketch: norms of all weights in 32 groups, by which weights of another type are compared.
        tokenizer_sha256: the hash of the tokenizer's vocabulary, normaliser and pre-tokeniser.
        quantisation: how linear layers are quantised, or ``none``.
        embedding_bf16_sha256: the hash of the embedding table in bf16, the same for fp32 and bf16; empty in files of
            earlier versions, and for fp16.
        linear_sketch: projections of linear layers on random signs, in 32 groups; empty in files of earlier versions.
        linear_norms: the norms of those groups.
    """

    kind: str
    architecture: str
    embedding_shape: tuple[int, int]
    embedding_dtype: str
    embedding_sha256: str
    embedding_sketch: tuple[float, ...]
    weights_sha256: str
    weights_sketch: tuple[float, ...]
    tokenizer_sha256: str
    quantisation: str = "none"
    embedding_bf16_sha256: str = ""
    linear_sketch: tuple[float, ...] = ()
    linear_norms: tuple[float, ...] = ()

    @classmethod
    def of(cls, backbone: Backbone) -> Fingerprint:
        """Take a backbone's fingerprint; the embedding table is read once, row block by row block."""
        table = next(backbone.embedding.parameters()).detach()
        picked = torch.linspace(0, len(table) - 1, _SKETCH_ROWS).long()
        norms = table[picked.to(table.device)].float().norm(dim=1).cpu().tolist()
        return cls(
            backbone.kind,
            type(backbone.model).__name__,
            (int(table.shape[0]), int(table.shape[1])),
            str(table.dtype).removeprefix("torch."),
            _hash_of(table, table.dtype),
            tuple(round(norm, 6) for norm in norms),
            backbone.checksum(),
            _weights_sketch(backbone) if backbone.quantisation == "none" else (),
            _tokenizer_hash(backbone),
            backbone.quantisation,
            "" if table.dtype == torch.float16 else _hash_of(table, torch.bfloat16),
            *_linear_sketch(backbone, table.dtype),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return in words how `other` differs, or None where both are of one backbone, whatever its type or bits."""
        for name in ("kind", "architecture", "embedding_shape"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {theirs} instead of {mine}"
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return "another tokenizer"
        if not self._same_embedding(other):
            return "other values in the embedding table"
        return self._weights_difference(other)

    def _same_embedding(self, other: Fingerprint) -> bool:
        hashes = [(self.embedding_bf16_sha256, other.embedding_bf16_sha256)]
        if self.embedding_dtype == other.embedding_dtype:
            hashes.append((self.embedding_sha256, other.embedding_sha256))
        alike = all(mine == theirs for mine, theirs in hashes if mine and theirs)
        return alike and _close(self.embedding_sketch, other.embedding_sketch)

    def _weights_difference(self, other: Fingerprint) -> str | None:
        """Compare the weights: bit by bit where both are held alike, else up to what rounding changes."""
        held_alike = self.embedding_dtype == other.embedding_dtype and self.quantisation == other.quantisation
        if held_alike and self.weights_sha256 == other.weights_sha256:
            return None
        if self.quantisation == other.quantisation == "none":
            if held_alike or not _close(self.weights_sketch, other.weights_sketch):
                return "other values in the weights"
            if not self.linear_sketch or not other.linear_sketch:
                return None
        return self._linear_difference(other)

    def _linear_difference(self, other: Fingerprint) -> str | None:
        if not self.linear_sketch or not other.linear_sketch:
            return (
                "its fingerprint is of an earlier version and cannot be compared with a quantised model's; load the "
                "tags on the unquantised model and save them again"
            )
        norms = zip(self.linear_norms, other.linear_norms, strict=True)
        pairs = zip(self.linear_sketch, other.linear_sketch, strict=True)
        shares = [
            ((a - b) / max(*norm)) ** 2 for (a, b), norm in zip(pairs, norms, strict=True) if max(norm) > 0
        ]  # of models with few layers some groups are empty
        kinds = (self.quantisation, other.quantisation)
        tolerance = max(_LINEAR_TOLERANCE.get(kind, _COARSE_TOLERANCE) for kind in kinds)
        differs = math.sqrt(sum(shares) / max(len(shares), 1))
        if differs <= tolerance:
            return None
        told = f", by {differs:.2g} of their norm where {' and '.join(sorted(set(kinds)))} may differ by {tolerance}"
        return f"other values in the weights of linear layers{told}"

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """Read what `to_json` returned.

        Raises:
            TypeError, KeyError, ValueError: the data is not a fingerprint.
        """
        return cls(
            str(data["kind"]),
            str(data["architecture"]),
            (int(data["embedding_shape"][0]), int(data["embedding_shape"][1])),
            str(data["embedding_dtype"]),
            str(data["embedding_sha256"]),
            tuple(float(norm) for norm in data["embedding_sketch"]),
            str(data["weights_sha256"]),
            tuple(float(norm) for norm in data["weights_sketch"]),
            str(data["tokenizer_sha256"]),
            str(data.get("quantisation", "none")),
            str(data.get("embedding_bf16_sha256", "")),
            tuple(float(value) for value in data.get("linear_sketch", ())),
            tuple(float(value) for value in data.get("linear_norms", ())),
        )


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return len(mine) == len(theirs) and all(
        abs(a - b) <= _SKETCH_TOLERANCE * max(abs(a), 1e-6) for a, b in zip(mine, theirs, strict=True)
    )


@torch.no_grad()
def _weights_sketch(backbone: Backbone) -> tuple[float, ...]:
    squares = [0.0] * _SKETCH_GROUPS
    for index, parameter in enumerate(backbone.model.parameters()):
        squares[index % _SKETCH_GROUPS] += float(torch.linalg.vector_norm(whole(parameter), dtype=torch.float32)) ** 2
    return tuple(round(math.sqrt(square), 6) for square in squares)


def _hash_of(table: torch.Tensor, dtype: torch.dtype) -> str:
    """Hash a table in some type, row block by row block."""
    digest = hashlib.sha256()
    for block in table.split(8192):
        digest.update(block.to(dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _linear_sketch(backbone: Backbone, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sums, squares = [0.0] * _SKETCH_GROUPS, [0.0] * _SKETCH_GROUPS
    for index, (_, module, width) in enumerate(linear_layers(backbone.model)):
        value, norm = projection(module, width, dtype, 2 * index)
        sums[index % _SKETCH_GROUPS] += value
        squares[index % _SKETCH_GROUPS] += norm**2
    return tuple(round(value, 6) for value in sums), tuple(round(math.sqrt(value), 6) for value in squares)


def _tokenizer_hash(backbone: Backbone) -> str:
    spec = json.loads(backbone.tokenizer.backend_tokenizer.to_str())
    told = [spec["normalizer"], spec["pre_tokenizer"], sorted(backbone.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
