"""How text is cut by each rule, and SentencePiece vocabularies, whose merges a file does not hold."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from icl_markup.errors import BackboneError
from icl_markup.gguf_tokenizers import RULES, gemma_tokenizer, merges_of
from icl_markup.text import TextEncoder

TEXT = "I'LL pay 1234, café's\n\n  x"
CUTS = {
    "gpt-2": ["I", "'", "LL", " pay", " 1234", ",", " café", "'s", "\n\n ", " x"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", ",", " café", "'s", "\n\n ", " x"],
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", ",", " café", "'s", "\n\n", " ", " x"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "4", ",", " café", "'s", "\n\n", " ", " x"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", ",", " café", "'s", "\n\n", " ", " x"],
    "gpt-4o": ["I'LL", " pay", " ", "123", "4", ",", " café's", "\n\n", " ", " x"],
    "default": ["I", "'", "LL", " pay", " ", "123", "4", ",", " café", "'", "s", "\n\n ", " x"],
    "falcon": ["I", "'", "LL", " pay", " ", "123", "4", ",", " café", "'", "s", "\n\n ", " x"],
    "deepseek-coder": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", ",", " café", "'", "s", "\n", "\n", " ", " x"],
    "deepseek-llm": ["I", "'", "LL", " pay", " ", "1234", ",", " caf", "é", "'", "s", "\n", "\n", " ", " x"],
    "deepseek-v3": ["I", "'LL", " pay", " ", "123", "4", ",", " café", "'s", "\n\n", " ", " x"],
}


def cut(pre: str, text: str) -> list[str]:
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": RULES[pre].pre_tokenizer(), "post_processor": None, "decoder": None,
        "model": json.loads(Tokenizer(models.BPE()).to_str())["model"],
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_original_tokenizers_do(pre: str) -> None:
    assert cut(pre, TEXT) == CUTS[pre]


@pytest.mark.parametrize("pre", RULES)
def test_every_rule_cuts_any_text_without_a_loss(pre: str) -> None:
    text = "Ünïcödé 中文 한국어 עברית 🙂👩‍👩‍👧 ½²  \t\r\n\n'''x''' <a href=\"x\">{[(…)]}</a> A1b22c333d4444"
    assert "".join(cut(pre, text)) == text


def gemma_fields(**changes: Any) -> dict[str, Any]:
    """A vocabulary as llama.cpp writes Gemma's: tokens that users added have spaces, and have lost their scores."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    added = ["\n", "\n\n", "  ", "   "]
    letters = ["▁", *"abcdefghij"]
    words = ["ab", "▁a", "▁ab", "cd", "abcd"]
    tokens = special + added + letters + words + [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [-1000.0] * 8 + [-100.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores + [0.0] * 256,
        "tokenizer.ggml.token_type": [3] * 4 + [4] * 4 + [1] * (len(letters) + len(words)) + [6] * 256,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    } | changes


def test_a_gemma_vocabulary_is_read_with_its_added_tokens() -> None:
    fields = gemma_fields()
    tokenizer = gemma_tokenizer(fields, "m")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab  ab\n\nx")["input_ids"])
    assert tokens == ["<bos>", "ab", "▁▁", "ab", "\n\n", "<0x78>"]
    assert tokenizer.decode(tokenizer("ab  ab\n\nx", add_special_tokens=False)["input_ids"]) == "ab  ab\n\nx"
    assert sorted(tokenizer.added_tokens_decoder) == list(range(8))
    assert tokenizer.added_tokens_decoder[6].content == "▁▁"


@pytest.mark.parametrize(("changes", "told"), [
    ({"tokenizer.ggml.bos_token_id": 400}, "bos_token_id is 400, but it has 280 tokens"),
    ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id is -1, but it has 280 tokens"),
    ({"tokenizer.ggml.unknown_token_id": 400}, "unknown_token_id is 400, but it has 280 tokens"),
    ({"tokenizer.ggml.scores": ["1"] * 280}, "value 0 of its tokenizer.ggml.scores is '1', not a number"),
    ({"tokenizer.ggml.merges": [["a", "b"]]}, "merges is ['a', 'b'], not a text"),
])  # fmt: skip
def test_damage_of_a_gemma_vocabulary_is_one_clear_error(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BackboneError, match=f"^m: damaged: .*{re.escape(told)}"):
        gemma_tokenizer(gemma_fields(**changes), "m")


def test_text_of_users_never_becomes_a_special_token() -> None:
    tokenizer = gemma_tokenizer(gemma_fields(), "m")
    assert not set(TextEncoder(tokenizer).encode("a<bos>b<eos><pad>")) & {0, 1, 2}


def test_merges_go_by_score_and_longer_pieces_first() -> None:
    tokens, scores = ["a", "b", "ab", "ba", "aba"], [-9.0, -9.0, -2.0, -3.0, -1.0]
    assert merges_of(tokens, scores) == [("ab", "a"), ("a", "ba"), ("a", "b"), ("b", "a")]


def test_merges_are_those_of_transformers() -> None:
    base = pytest.importorskip("transformers.tokenization_utils_base")
    pieces = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.product("ab", repeat=size)]
    scores = [-float(i % 5) for i in range(len(pieces))]
    ids = {token: index for index, token in enumerate(pieces)}
    assert merges_of(pieces, scores) == base.generate_merges(ids, dict(zip(pieces, scores, strict=True)))
