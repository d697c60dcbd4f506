"""Fingerprints of a backbone: is this the model that the tags were made for?

A model in another type, quantised, or dequantized from a GGUF file is the same model. What is kept exactly is compared
exactly; the rest by what it gives for random signs (`icl_markup.sketches`), up to what rounding to so few bits changes.
Two tokenizers are the same if they have the same tokens and give the same ids, however they are written down.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from icl_markup.backbone import Backbone
from icl_markup.gguf import dequantized_types
from icl_markup.sketches import difference, embedding_sketch, linear_sketch, tolerance, weight_norms

_SKETCH_ROWS = 64
_SKETCH_TOLERANCE = 0.02
"""Rows' norms of one table stored as fp32, bf16 or fp16 differ by less than this share."""

_PROBES = (
    "The quick brown fox didn't see 1,234,567.89 dogs; it's 50% off, they'll say! We'Ve I'M",
    " leading  two   three    four\ttab\t\ttabs\nline\n\nlines\n\n\n  \n indented\r\n trailing ",
    'camelCase snake_case kebab-case http://example.org/a?b=c&d=e#f user@example.org <a href="x">{[(…)]}</a>',
    "Ünïcödé café cafe\u0301 Привет Ελληνικά שלום مرحبا हिन्दी ไทย 한국어 日本語テキスト 中文字符１２３ ½ ² Ⅷ",
    "🙂👩‍👩‍👧🇫🇷✅ \u00a0\u200b\ufeff  ```code``` ======= ------ $$ € £ ¥ № §",
)
"""Texts whose ids tell tokenizers of one vocabulary apart; they belong to the format and must not be changed."""


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
        tokenizer_ids_sha256: the hash of the tokens that the embedding has rows for and of the ids of some texts;
            empty in files of earlier versions, as are the following.
        dequantized: the coarsest type of a GGUF file's weights that the model was dequantized from; empty: of none.
        dequantized_embedding: the type of its embedding.
        projected_embedding: projections of the embedding table on random signs, in 64 groups.
        projected_norms: the norms of those groups.
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
    tokenizer_ids_sha256: str = ""
    dequantized: str = ""
    dequantized_embedding: str = ""
    projected_embedding: tuple[float, ...] = ()
    projected_norms: tuple[float, ...] = ()

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
            weight_norms(backbone.model) if backbone.quantisation == "none" else (),
            _tokenizer_hash(backbone),
            backbone.quantisation,
            "" if table.dtype == torch.float16 else _hash_of(table, torch.bfloat16),
            *linear_sketch(backbone.model, table.dtype),
            _tokenizer_ids_hash(backbone),
            *dequantized_types(backbone.model.config),
            *embedding_sketch(table),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return in words how `other` differs, or None where both are of one backbone, whatever its type or bits."""
        for name in ("kind", "architecture", "embedding_shape"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {theirs} instead of {mine}"
        if not self._same_tokenizer(other):
            return "another tokenizer"
        if self._is_dequantized or other._is_dequantized:
            return self._embedding_difference(other) or self._dequantized_difference(other)
        if not self._same_embedding(other):
            return "other values in the embedding table"
        return self._weights_difference(other)

    @property
    def _is_dequantized(self) -> bool:
        return bool(self.dequantized or self.dequantized_embedding)

    def _same_tokenizer(self, other: Fingerprint) -> bool:
        if self.tokenizer_ids_sha256 and other.tokenizer_ids_sha256:
            return self.tokenizer_ids_sha256 == other.tokenizer_ids_sha256
        return self.tokenizer_sha256 == other.tokenizer_sha256

    def _embedding_difference(self, other: Fingerprint) -> str | None:
        """Compare embeddings one of which was dequantized."""
        if not self.projected_embedding or not other.projected_embedding:
            return _EARLIER
        mine = (self.projected_embedding, self.projected_norms)
        theirs = (other.projected_embedding, other.projected_norms)
        kinds = [_kind(of.dequantized_embedding) for of in (self, other)]
        return _told("the embedding table", difference(mine, theirs), kinds)

    def _dequantized_difference(self, other: Fingerprint) -> str | None:
        held_alike = self.embedding_dtype == other.embedding_dtype and self.quantisation == other.quantisation
        if held_alike and self.weights_sha256 == other.weights_sha256:
            return None
        return self._linear_difference(other)

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
            return _EARLIER
        mine, theirs = (self.linear_sketch, self.linear_norms), (other.linear_sketch, other.linear_norms)
        kinds = [kind for of in (self, other) for kind in (of.quantisation, _kind(of.dequantized))]
        return _told("the weights of linear layers", difference(mine, theirs), kinds)

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
            str(data.get("tokenizer_ids_sha256", "")),
            str(data.get("dequantized", "")),
            str(data.get("dequantized_embedding", "")),
            tuple(float(value) for value in data.get("projected_embedding", ())),
            tuple(float(value) for value in data.get("projected_norms", ())),
        )


_EARLIER = (
    "its fingerprint is of an earlier version and cannot be compared with a quantised model's; load the tags on the "
    "unquantised model and save them again"
)


def _kind(dequantized: str) -> str:
    return f"gguf-{dequantized}" if dequantized else "none"


def _told(what: str, differs: float, kinds: list[str]) -> str | None:
    """Return in words by how much two sketches differ; None where that is what rounding may change."""
    most = tolerance(kinds)
    if differs <= most:
        return None
    held = " and ".join(sorted(set(kinds) - {"none"})) or "rounding"
    return f"other values in {what}, by {differs:.2g} of their norm where {held} may change {most:g}"


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return len(mine) == len(theirs) and all(
        abs(a - b) <= _SKETCH_TOLERANCE * max(abs(a), 1e-6) for a, b in zip(mine, theirs, strict=True)
    )


def _hash_of(table: torch.Tensor, dtype: torch.dtype) -> str:
    """Hash a table in some type, row block by row block."""
    digest = hashlib.sha256()
    for block in table.split(8192):
        digest.update(block.to(dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_hash(backbone: Backbone) -> str:
    spec = json.loads(backbone.tokenizer.backend_tokenizer.to_str())
    told = [spec["normalizer"], spec["pre_tokenizer"], sorted(backbone.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _tokenizer_ids_hash(backbone: Backbone) -> str:
    """Hash what a tokenizer does: its tokens, those aside that the model has no row for, and the ids of some texts."""
    vocabulary = backbone.tokenizer.get_vocab().items()
    tokens = sorted((index, token) for token, index in vocabulary if index < backbone.first_tag_id)
    told = [tokens, [backbone.encoder.encode(text) for text in _PROBES]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
