"""Fingerprints of a backbone: is this the model that the tags were made for?"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icl_markup.backbone import Backbone

_SKETCH_ROWS = 64
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
        tokenizer_sha256: the hash of the tokenizer's vocabulary.
    """

    kind: str
    architecture: str
    embedding_shape: tuple[int, int]
    embedding_dtype: str
    embedding_sha256: str
    embedding_sketch: tuple[float, ...]
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
        vocabulary = sorted(backbone.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return cls(
            backbone.kind,
            type(backbone.model).__name__,
            (int(table.shape[0]), int(table.shape[1])),
            str(table.dtype).removeprefix("torch."),
            digest.hexdigest(),
            tuple(round(norm, 6) for norm in norms),
            hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest(),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return in words how `other` differs, or None where both are of one backbone, whatever its dtype."""
        for name in ("kind", "architecture", "embedding_shape"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {theirs} instead of {mine}"
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return "another vocabulary in the tokenizer"
        if self.embedding_dtype == other.embedding_dtype:
            same = self.embedding_sha256 == other.embedding_sha256
        else:
            pairs = zip(self.embedding_sketch, other.embedding_sketch, strict=True)
            same = all(abs(a - b) <= _SKETCH_TOLERANCE * max(abs(a), 1e-6) for a, b in pairs)
        return None if same else "other values in the embedding table"

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
            str(data["tokenizer_sha256"]),
        )
