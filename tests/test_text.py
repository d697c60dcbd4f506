"""Text encoding: no text yields a special token, bytes survive, and spaces stay under the composer's control."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import BackboneError
from icl_markup.text import TextEncoder
from tests.conftest import KINDS, byte_level_tokenizer, shared_path, unigram_tokenizer, wordpiece_tokenizer

FAST = settings(max_examples=60, deadline=None, derandomize=True)
BYTE_LEVEL = ("llama", "roberta")
REAL = ("karpathy-stories260K", "flan-t5-tokenizer")

TAGS = ["<classification>", "<options>", "<demo>", "<input>", "<label>", "</label>"]
SPECIALS = [
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>",
    "<extra_id_1>", "<extra_id_99>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|eot_id|>", "<0x0A>", "<bos>", "<eos>", "[INST]", "\u2581", "\u0120", "##s", "[unused0]",
]  # fmt: skip
SYNTAX = [
    "{text}",
    "{label}",
    "{symbol}",
    "@demo",
    "@tag <x>",
    "\\n",
    "\\<",
    "# a",
    "{",
    "}",
    "\\",
    "\0",
    "\n",
    " ",
    "  ",
]
WORDS = ["I lost my card", "when do you open", "A", " B", "C:", "é", "日本語", "\u200b", "👩‍👩‍👧", "ﬁ", "\u0301"]


def adversarial_text() -> st.SearchStrategy[str]:
    """Random unicode between strings that some part of the pipeline might take for markup."""
    part = st.one_of(st.sampled_from(TAGS + SPECIALS), st.sampled_from(SYNTAX + WORDS), st.text(max_size=6))
    return st.lists(part, max_size=8).map("".join)


@st.composite
def adversarial_episodes(draw: st.DrawFn, most_queries: int = 1) -> Episode:
    """Episodes whose texts, names and description are adversarial."""
    text = adversarial_text().filter(str.strip)
    options = draw(st.lists(text, min_size=2, max_size=4))
    demos = draw(st.lists(st.builds(Demo, text, st.integers(0, len(options) - 1)), max_size=3))
    queries = draw(st.lists(st.builds(Query, text, st.none()), min_size=1, max_size=most_queries))
    return Episode(tuple(map(Option, options)), tuple(demos), tuple(queries), "t", draw(adversarial_text()))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": lambda: byte_level_tokenizer(mask=False),
    "roberta": lambda: byte_level_tokenizer(mask=True),
    "t5": unigram_tokenizer,
    "bert": wordpiece_tokenizer,
}


@lru_cache
def encoder_of(kind: str) -> TextEncoder:
    return TextEncoder(TOKENIZERS[kind]())


@pytest.fixture(scope="module", params=REAL)
def real_encoder(request: pytest.FixtureRequest) -> TextEncoder:
    folder = shared_path("models", request.param)
    return TextEncoder(transformers.AutoTokenizer.from_pretrained(folder, use_fast=True))


def forbidden_ids(encoder: TextEncoder, text: str) -> set[int]:
    """The special and added ids that a text yields, the unknown token set aside."""
    return set(encoder.encode(text)) & (encoder.reserved_ids - {encoder.unknown_id})


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(text=adversarial_text())
def test_no_text_yields_a_reserved_id(kind: str, text: str) -> None:
    assert not forbidden_ids(encoder_of(kind), text)


@pytest.mark.parametrize("kind", KINDS)
def test_no_special_token_written_out_yields_its_own_id(kind: str) -> None:
    encoder = encoder_of(kind)
    assert len(encoder.reserved_ids) == 5
    for token in encoder.tokenizer.get_vocab():
        for text in (token, f" {token}", f"a{token}b", f"{token}{token}"):
            assert not forbidden_ids(encoder, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_itself_would_have_yielded_them(kind: str) -> None:
    """The premise of the encoder: if this fails, the tests above show nothing."""
    encoder = encoder_of(kind)
    specials = [t for t in encoder.tokenizer.all_special_tokens if t != encoder.tokenizer.unk_token]
    ids = set(encoder.tokenizer(" ".join(specials), add_special_tokens=False)["input_ids"])
    assert ids & (encoder.reserved_ids - {encoder.unknown_id})


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@FAST
@given(text=adversarial_text())
def test_byte_level_text_decodes_to_exactly_itself(kind: str, text: str) -> None:
    encoder = encoder_of(kind)
    assert encoder.decode(encoder.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(text=adversarial_text())
def test_encoding_depends_on_the_text_alone(kind: str, text: str) -> None:
    encoder = encoder_of(kind)
    fresh = TextEncoder(encoder.tokenizer)
    assert fresh.encode(text) == encoder.encode(text) == encoder.encode(text)


@pytest.mark.parametrize(("kind", "marks"), [("llama", True), ("roberta", True), ("t5", True), ("bert", False)])
def test_a_leading_space_is_significant_exactly_where_spaces_are_marked(kind: str, marks: bool) -> None:
    encoder = encoder_of(kind)
    assert encoder.marks_spaces is marks
    for word in ("yes", "A", "card", "when do you open", "lost my card"):
        assert (encoder.encode(f" {word}") != encoder.encode(word)) is marks, word


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_has_no_ids_and_nothing_is_put_around_a_text(kind: str) -> None:
    encoder = encoder_of(kind)
    assert encoder.encode("") == []
    assert not set(encoder.encode("lost my card")) & encoder.reserved_ids
    long = "lost my card " * 2000
    assert len(encoder.encode(long)) > 4000, "a tokenizer's own truncation must not apply"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer_for_ordinary_text(kind: str) -> None:
    encoder = encoder_of(kind)
    text = " lost my card" if encoder.marks_spaces else "lost my card"
    assert encoder.encode(text) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_left_as_it_was(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    before = tokenizer.backend_tokenizer.to_str()
    TextEncoder(tokenizer).encode("<s> [MASK] text")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_an_unknown_token_that_is_also_the_beginning_of_text_is_no_way_in() -> None:
    """GPT-2 has one token for the beginning, the end and the unknown."""
    backend = byte_level_tokenizer(mask=False).backend_tokenizer
    same = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<s>"}
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, **same))
    for text in ("<s>", " <s>", "a <s> b", "<s><s>", "</s><mask><pad>"):
        assert not set(encoder.encode(text)) & encoder.reserved_ids, text
        assert encoder.decode(encoder.encode(text)) == text


def test_tokens_that_a_user_added_are_reserved_too() -> None:
    tokenizer = copy.deepcopy(byte_level_tokenizer(mask=False))
    tokenizer.add_tokens(["<demo>", "card"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    encoder = TextEncoder(tokenizer)
    assert set(tokenizer.convert_tokens_to_ids(["<demo>", "card", "<|im_start|>"])) <= encoder.reserved_ids
    assert not set(encoder.encode("<demo> my card <|im_start|>")) & encoder.reserved_ids


def test_white_space_that_is_declared_as_an_added_token_keeps_its_token() -> None:
    """Gemma's newlines are entries of the vocabulary and added tokens at the same time."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<0x0A>", "\n", "\n\n", "a", "▁", "<td>"])}
    merges = [("\n", "\n")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["\n", "\n\n", "<td>"])
    encoder = TextEncoder(tokenizer)
    for text in ("\n", "\n\n", "a\n a", "\n\na"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode(text) == ids
        assert vocabulary["<0x0A>"] not in ids
    assert vocabulary["<td>"] in encoder.reserved_ids
    assert vocabulary["<td>"] not in encoder.encode("<td>")


def test_a_tokenizer_that_does_not_declare_its_unknown_token_still_encodes_unknown_text() -> None:
    backend = wordpiece_tokenizer().backend_tokenizer
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]"))
    assert not set(encoder.encode("[MASK] 日本語")) & {backend.token_to_id("[MASK]"), backend.token_to_id("[CLS]")}


@FAST
@given(text=adversarial_text())
def test_no_text_yields_a_reserved_id_of_a_real_tokenizer(real_encoder: TextEncoder, text: str) -> None:
    assert not forbidden_ids(real_encoder, text)


def test_no_special_token_of_a_real_tokenizer_yields_its_id(real_encoder: TextEncoder) -> None:
    specials = [*real_encoder.tokenizer.all_special_tokens, *TAGS, *SPECIALS]
    for token in specials:
        for text in (token, f" {token}", f"a{token}b", f"{token} {token}"):
            assert not forbidden_ids(real_encoder, text), text


def test_real_tokenizers_mark_spaces_and_spell_words_alike(real_encoder: TextEncoder) -> None:
    assert real_encoder.marks_spaces
    for word in ("yes", "A", "the little girl"):
        assert real_encoder.encode(f" {word}") != real_encoder.encode(word)
        own = real_encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
        assert own == real_encoder.encode(f" {word}"), "these two put a space before what they are given"


class TokenizerWithoutBackend:
    name_or_path = "some/slow-model"


@pytest.mark.parametrize("make", [transformers.ByT5Tokenizer, TokenizerWithoutBackend])
def test_a_tokenizer_without_a_fast_backend_is_refused_with_a_remedy(
    make: Callable[[], PreTrainedTokenizerBase],
) -> None:
    with pytest.raises(BackboneError, match=r"no fast implementation.*use_fast=True") as caught:
        TextEncoder(make())
    assert make.__name__ in str(caught.value)
