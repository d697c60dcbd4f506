"""Tokenizers from GGUF files, with the ids of the tokenizers that the files were made from.

A GGUF file holds a vocabulary and its merges, and the name of the rule by which text is cut before it is merged
(``tokenizer.ggml.pre``). That rule decides ids as much as the merges do, so each name stands in a table here, and a
name that does not is an error: a rule that nearly fits would give other ids, and nobody would notice.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from icl_markup.errors import BackboneError, nearest

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Values of ``tokenizer.ggml.token_type``; 1 is an ordinary token, 2 the unknown one, 6 a byte."""

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN = "[一-龥ࠀ-一가-퟿]+"
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Letters that have a case; escaped are those that Unicode's NFC would turn into others."""

_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""


@dataclass(frozen=True)
class Rule:
    """How a byte-level tokenizer reads text before it merges.

    Attributes:
        cuts: regular expressions that isolate what they match, one after the other.
        has_digits: whether digits are cut apart first.
        is_gpt2: whether GPT-2's expression is the last cut.
        normalizes: whether text is put into Unicode's NFC first.
        ignores_merges: whether a cut that is a token as it stands is taken whole.
        begins: whether a text begins with BOS if the file does not say.
    """

    cuts: tuple[str, ...] = ()
    has_digits: bool = False
    is_gpt2: bool = False
    normalizes: bool = False
    ignores_merges: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """Return it as the pre-tokenizer of a ``tokenizer.json``."""
        parts: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.has_digits else []
        parts += [
            {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in self.cuts
        ]
        parts.append(_byte_level(self.is_gpt2))
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


_QWEN2 = Rule((rf"{_WORDS}|\p{{N}}|{_REST}",), normalizes=True)
_LLAMA3 = Rule((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignores_merges=True, begins=True)
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_REST_SLASH}"
)
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

RULES: dict[str, Rule] = {
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Rule(is_gpt2=True),
    "phi-2": Rule(is_gpt2=True),
    "smollm": Rule(has_digits=True, is_gpt2=True),
    "starcoder": Rule(has_digits=True, is_gpt2=True),
    "refact": Rule(has_digits=True, is_gpt2=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "qwen35": Rule((_QWEN35,), normalizes=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "tekken": Rule((_TEKKEN,), ignores_merges=True, begins=True),
    "gpt-4o": Rule((_GPT4O,)),
    "falcon": Rule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": Rule((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "deepseek-llm": Rule(("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, r"\p{N}+")),
    "deepseek-coder": Rule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
    "deepseek-v3": Rule(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}
"""How text is cut, by ``tokenizer.ggml.pre``; the expressions are those of llama.cpp and of the original tokenizers."""


def byte_level_tokenizer(fields: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a file whose vocabulary is byte-level BPE (``tokenizer.ggml.model`` is ``gpt2``).

    Args:
        fields: the file's metadata.
        name: the file, for errors.

    Raises:
        BackboneError: the file lacks the merges or the name of its rule, the rule is not known, or what the file says
            is damaged.
    """
    rule = _rule(fields, name)
    tokens, types = _vocabulary(fields, name)
    merges = _merges(fields, name)
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", rule.begins))
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": {"type": "NFC"} if rule.normalizes else None,
        "pre_tokenizer": rule.pre_tokenizer(),
        "post_processor": _begins_with(tokens, _special(fields, "bos", tokens, name)) if begins else None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignores_merges,
            "vocab": {token: index for index, token in enumerate(tokens) if not _is_padding(index, token, types)},
            "merges": merges,
        },
    }
    return _wrapped(spec, fields, tokens, name)


def gemma_tokenizer(fields: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a Gemma 1, 2 or 3: SentencePiece's BPE with ``▁`` for spaces, and none before a text.

    Args:
        fields: the file's metadata.
        name: the file, for errors.

    Raises:
        BackboneError: the file lacks the vocabulary or its scores, or what it says is damaged.
    """
    tokens, types = _vocabulary(fields, name)
    unknown = _special(fields, "unknown", tokens, name)
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", True))
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _begins_with(tokens, _special(fields, "bos", tokens, name)) if begins else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token.replace(" ", "▁"): index for index, token in enumerate(tokens)},
        },
    }
    return _with_pieces(spec, fields, tokens, types, name)


def corrected_tokenizer(
    built: PreTrainedTokenizerBase, fields: Mapping[str, Any], name: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that transformers built of a file, with the added tokens and merges of the original one.

    Args:
        built: what transformers made of the file.
        fields: the file's metadata.
        name: the file, for errors.

    Raises:
        BackboneError: the vocabulary is damaged.
    """
    tokens, types = _vocabulary(fields, name)
    spec = json.loads(built.backend_tokenizer.to_str())
    if fields.get("tokenizer.ggml.model") == "llama":
        return _with_pieces(spec, fields, tokens, types, name)
    return _wrapped(spec, fields, tokens, name)


def _with_pieces(
    spec: dict[str, Any], fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a SentencePiece vocabulary, whose merges follow from its scores.

    The scores of tokens that users added are lost in the file: they were 0, the highest. Such tokens are stored with
    spaces in place of ``▁``.
    """
    vocabulary = spec["model"]["vocab"]
    pieces = [_spelled(token, index, vocabulary) for index, token in enumerate(tokens)]
    if "tokenizer.ggml.merges" in fields:
        spec["model"]["merges"] = _merges(fields, name)
    else:
        scores = fields.get("tokenizer.ggml.scores")
        if not isinstance(scores, Sequence) or len(scores) != len(tokens):
            raise BackboneError(f"{name}: has no score for each token (tokenizer.ggml.scores): {_CONVERT}")
        _all_are((int, float), "number", scores, "scores", name)
        weights = [0.0 if kind == USER_DEFINED else score for kind, score in zip(types, scores, strict=True)]
        spec["model"]["merges"] = merges_of(pieces, weights)
    spec["added_tokens"] = _added(pieces, types)
    return _wrapped(spec, fields, pieces, name)


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary, as transformers writes them: by score, the best first.

    Args:
        tokens: the vocabulary.
        scores: their scores.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted((ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids)
        found += [(score, len(left), len(right), left, right) for _, _, left, right in known]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


_AGAIN = "download it again"
_CONVERT = "convert the model again with a current llama.cpp, or take the folder that it was converted from"


def _rule(fields: Mapping[str, Any], name: str) -> Rule:
    pre = fields.get("tokenizer.ggml.pre")
    if not pre:
        raise BackboneError(f"{name}: does not say how text is cut before merging (tokenizer.ggml.pre): {_CONVERT}")
    if not isinstance(pre, str) or pre not in RULES:
        raise BackboneError(
            f"{name}: how text is cut before merging, {pre!r} (tokenizer.ggml.pre), is not known here"
            f"{nearest(str(pre), RULES)}; take the transformers folder that the file was converted from; known are "
            f"{', '.join(sorted(RULES))}"
        )
    return RULES[pre]


def _vocabulary(fields: Mapping[str, Any], name: str) -> tuple[list[str], list[int]]:
    """Return a file's tokens and their types; ordinary ones if it says nothing of types."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or not tokens:
        raise BackboneError(
            f"{name}: has no tokenizer (tokenizer.ggml.tokens): take another file, or the transformers folder that it "
            "was converted from"
        )
    _all_are(str, "text", tokens, "tokens", name)
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, Sequence) or len(types) != len(tokens):
        raise BackboneError(f"{name}: damaged: {len(tokens)} tokens, but not as many types of tokens")
    _all_are(int, "number", types, "token_type", name)
    return list(tokens), list(types)


def _merges(fields: Mapping[str, Any], name: str) -> list[list[str]]:
    """Return a file's merges, each as its two halves."""
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, Sequence) or not merges:
        raise BackboneError(f"{name}: has no merges (tokenizer.ggml.merges): {_CONVERT}")
    _all_are(str, "text", merges, "merges", name)
    return [merge.split(" ", 1) for merge in merges]


def _special(fields: Mapping[str, Any], word: str, tokens: Sequence[str], name: str) -> int | None:
    """Return the id of a special token, such as ``bos``; None if the file names none."""
    key = f"tokenizer.ggml.{word}_token_id"
    index = fields.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(tokens):
        raise BackboneError(f"{name}: damaged: its {key} is {short(index)}, but it has {len(tokens)} tokens; {_AGAIN}")
    return index


def _all_are(kind: type | tuple[type, ...], word: str, values: Sequence[Any], key: str, name: str) -> None:
    """Refuse a list with something else in it, or a text in place of a list.

    Raises:
        BackboneError: there is such a value; the message shows the first.
    """
    if isinstance(values, str):
        raise BackboneError(f"{name}: damaged: its tokenizer.ggml.{key} is {short(values)}, not a list; {_AGAIN}")
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise BackboneError(
                f"{name}: damaged: value {index} of its tokenizer.ggml.{key} is {short(value)}, not a {word}; {_AGAIN}"
            )


def short(value: object) -> str:
    """Return a value of a file as messages show it."""
    return reprlib.repr(value)


def _is_padding(index: int, token: str, types: Sequence[int]) -> bool:
    """Whether a token only fills the table up; the original tokenizer has no such token."""
    return types[index] == UNUSED and token == f"[PAD{index}]"


def _spelled(token: str, index: int, vocabulary: Mapping[str, int]) -> str:
    """Return a token as the vocabulary spells it: of spaces, ``▁`` stands in it."""
    spelled = token.replace(" ", "▁")
    return spelled if vocabulary.get(spelled) == index else token


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Return the tokens that are found in text before it is cut, as in a ``tokenizer.json``."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **plain, "special": kind == CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": use_regex, "use_regex": use_regex}


def _begins_with(tokens: Sequence[str], index: int | None) -> dict[str, Any] | None:
    """Return what puts a token before each text; None if there is no such token."""
    if index is None:
        return None
    token = tokens[index]
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    known = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": known,
    }


def _wrapped(
    spec: Mapping[str, Any], fields: Mapping[str, Any], tokens: Sequence[str], name: str
) -> PreTrainedTokenizerFast:
    """Return a ``tokenizer.json`` as a tokenizer of transformers, with the file's special tokens and chat template."""
    special = {key: _special(fields, word, tokens, name) for key, word in _SPECIAL.items()}
    named = {key: tokens[index] for key, index in special.items() if index is not None}
    try:
        wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **named)
    except Exception as error:  # tokenizers raises nothing more specific
        raise BackboneError(f"{name}: damaged: its vocabulary makes no tokenizer: {_first_line(error)}") from error
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        wrapped.chat_template = template
    return wrapped


def _first_line(error: Exception) -> str:
    lines: Iterable[str] = str(error).splitlines()
    return next(iter(lines), type(error).__name__)
