"""Fingerprints of a backbone: is this the model that the tags were made for?"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icl_markup.backbone import Backbone

_SKETCH_ROWS = 64
_SKETCH_GROUPS = 32
_SKETCH_TOLERANCE = 0.02
"""Rows' norms of one table stored as fp32, bf16 or fp16 differ by less than this share."""


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

    @classmethod
    def of(cls, backbone: Backbone) -> Fingerprint:
        """Take a backbone's fingerprint; the embedding table is read once, row block by row block."""
        table = next(backbone.embedding.parameters()).detach()
        digest = hashlib.sha256()
        for block in table.split(8192):
            digest.update(block.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        picked = torch.linspace(0, len(table) - 1, _SKETCH_ROWS).long()
        norms = table[picked.to(table.device)].float().norm(dim=1).cpu().tolist()
        return cls(
            backbone.kind,
            type(backbone.model).__name__,
            (int(table.shape[0]), int(table.shape[1])),
            str(table.dtype).removeprefix("torch."),
            digest.hexdigest(),
            tuple(round(norm, 6) for norm in norms),
            backbone.checksum(),
            _weights_sketch(backbone),
            _tokenizer_hash(backbone),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return in words how `other` differs, or None where both are of one backbone, whatever its dtype."""
        for name in ("kind", "architecture", "embedding_shape"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {theirs} instead of {mine}"
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return "another tokenizer"
        alike = self.embedding_dtype == other.embedding_dtype
        if alike and self.embedding_sha256 != other.embedding_sha256:
            return "other values in the embedding table"
        if alike and self.weights_sha256 != other.weights_sha256:
            return "other values in the weights"
        if not _close(self.embedding_sketch, other.embedding_sketch):
            return "other values in the embedding table"
        return None if _close(self.weights_sketch, other.weights_sketch) else "other values in the weights"

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
        )


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return len(mine) == len(theirs) and all(
        abs(a - b) <= _SKETCH_TOLERANCE * max(abs(a), 1e-6) for a, b in zip(mine, theirs, strict=True)
    )


@torch.no_grad()
def _weights_sketch(backbone: Backbone) -> tuple[float, ...]:
    squares = [0.0] * _SKETCH_GROUPS
    for index, parameter in enumerate(backbone.model.parameters()):
        squares[index % _SKETCH_GROUPS] += float(torch.linalg.vector_norm(parameter, dtype=torch.float32)) ** 2
    return tuple(round(math.sqrt(square), 6) for square in squares)


def _tokenizer_hash(backbone: Backbone) -> str:
    spec = json.loads(backbone.tokenizer.backend_tokenizer.to_str())
    told = [spec["normalizer"], spec["pre_tokenizer"], sorted(backbone.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
