"""Text to token ids, with user text kept inert and spaces kept under the composer's control.

A tokenizer finds its special tokens (``[MASK]``, ``</s>``, ``<extra_id_0>``) inside ordinary text, and some
put a space before whatever they are given. A prompt that is assembled piece by piece can allow neither: text
that a user supplies must never yield a special token, and the composer alone decides where spaces go.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from icl_markup.errors import BackboneError

_APART = {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "Isolated", "invert": False}
"""Keeps the text ``<0x3C>`` from being taken for the token of that byte, which SentencePiece forbids and
``tokenizers`` does not: it must not be renamed, as bytes that are unknown are looked up by that name."""


class TextEncoder:
    """Encodes plain text with a copy of a tokenizer that knows no special tokens.

    The copy has no added tokens, no post-processor and no automatic prefix space, and the special tokens'
    entries in its vocabulary are renamed, so that no text whatsoever can match them. Ids are unchanged.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        BackboneError: the tokenizer has no ``tokenizers`` backend to copy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BackboneError(
                f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} has no fast implementation; "
                "convert it with AutoTokenizer(..., use_fast=True) and save it, then use the saved folder"
            )
        self.tokenizer = tokenizer
        # Gemma declares its newlines and tabs as added tokens; white space is text all the same.
        added = tokenizer.added_tokens_decoder.items()
        blank = {i for i, token in added if not token.special and not token.content.strip()}
        self.reserved_ids = frozenset(tokenizer.all_special_ids) | (frozenset(i for i, _ in added) - blank)
        self.unknown_id: int | None = tokenizer.unk_token_id
        self._plain = _plain_copy(backend, self.reserved_ids - {self.unknown_id})
        self.marks_spaces = self.encode(" a") != self.encode("a")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; none is a special or added token, save the unknown token and those of white space.

        A leading space is significant where the tokenizer marks word starts: ``" yes"`` and ``"yes"`` differ.
        """
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens included, without any cleaning up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def is_encodable(text: str) -> bool:
    """Return whether `text` is Unicode text: a lone surrogate, as broken JSON brings along, is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_copy(backend: Tokenizer, forbidden: frozenset[int | None]) -> Tokenizer:
    spec: dict[str, Any] = json.loads(backend.to_str())
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    spec["normalizer"] = _without_prefix_space(spec.get("normalizer"))
    spec["pre_tokenizer"] = _without_prefix_space(spec.get("pre_tokenizer"))
    if spec["model"].get("byte_fallback") and (
        spec["model"]["type"] == "Unigram" or spec["model"].get("ignore_merges")
    ):
        parts = [_APART, *([spec["pre_tokenizer"]] if spec["pre_tokenizer"] else [])]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    # Unknown text needs its token, whether or not the tokenizer declares it as such.
    unknown = spec["model"].get("unk_token")
    _rename_forbidden(spec["model"], forbidden - {backend.token_to_id(unknown) if unknown else None})
    return Tokenizer.from_str(json.dumps(spec))


def _without_prefix_space(component: Any) -> Any:
    """Drop every setting that makes a tokenizer put a space before the text it is given."""
    if not isinstance(component, Mapping):
        return component
    if component.get("type") == "Prepend":
        return None
    changed = dict(component)
    for sequence in ("normalizers", "pretokenizers"):
        if sequence in changed:
            parts = [_without_prefix_space(part) for part in changed[sequence]]
            parts = [part for part in parts if part is not None]
            # T5 splits on white space and lets Metaspace put every space back: with the latter switched off,
            # the former would swallow the spaces, so that Metaspace has to see them itself.
            if any(part.get("type") == "Metaspace" for part in parts):
                parts = [part for part in parts if part.get("type") != "WhitespaceSplit"]
            changed[sequence] = parts
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _rename_forbidden(model: dict[str, Any], forbidden: frozenset[int | None]) -> None:
    """Rename the vocabulary entries of `forbidden` ids to strings that no text contains."""
    secret = secrets.token_hex(16)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: position is id
        for index in forbidden:
            if index is not None and index < len(vocabulary):
                vocabulary[index] = [f"{secret}{index}", -1e4]
    elif isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        lost = {token for token, index in vocabulary.items() if index in forbidden}
        model["vocab"] = {
            (f"{secret}{index}" if token in lost else token): index for token, index in vocabulary.items()
        }
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not lost & set(_merge_parts(merge))]


def _merge_parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
