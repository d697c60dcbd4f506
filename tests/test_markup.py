"""The composer: what a text contains never changes what a prompt is made of, and long prompts give way in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_markup.answers import OptionSymbols
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import PromptError
from icl_markup.markup import SHORTEST_DEMO, Markup
from icl_markup.prompt import Prompt
from icl_markup.tags import TagTable
from icl_markup.template import Node, Template, shipped_templates
from tests.conftest import KINDS, tiny_backbone
from tests.test_text import BYTE_LEVEL, FAST, adversarial_episodes, adversarial_text

MARKUP = Template.load("markup_letters")
UNNUMBERED = Template.parse(MARKUP.source.replace("{symbol}: ", ""))
NAMES = ("lost card", "opening hours", "complaint")
MANY = Episode(tuple(Option(f"label {i}") for i in range(40)), (), (Query("a"),))

backbone_of = lru_cache(tiny_backbone)


def composer(kind: str, template: Template = MARKUP, **options: Any) -> Markup:
    backbone = backbone_of(kind)
    rows = torch.zeros(sum(tag.width for tag in template.tags), backbone.width)
    table = TagTable(template.tags, rows, backbone.first_tag_id) if template.tags else None
    return Markup(template, backbone.encoder, backbone.layout, table, **{"max_length": 1_000_000, **options})


def an_episode(demos: Sequence[str] = ("I lost my card", "are you open on Sunday", "this is awful")) -> Episode:
    shown = tuple(Demo(text, i % 3) for i, text in enumerate(demos))
    return Episode(tuple(map(Option, NAMES)), shown, (Query("when do you open", 1),))


def ids_of(prompt: Prompt, *kinds: str) -> list[int]:
    return [i for piece in prompt.pieces if piece.kind in kinds for i in piece.ids]


def values_of(prompt: Prompt) -> list[tuple[int, ...]]:
    return [piece.ids for piece in prompt.pieces if piece.kind == "value"]


def segment_of(prompt: Prompt, segment: int) -> list[tuple[int, ...]]:
    return [piece.ids for piece in prompt.pieces if piece.segment == segment]


def tag_ids_the_template_says(markup: Markup, episode: Episode) -> list[int]:
    """The ids of the tags in order, from the template's nodes alone."""
    t, stops = markup.template, markup.layout.stops_at_slot
    query, tail = (t.query[: t.query.index(Node("field", "label"))], ()) if stops else (t.query, t.tail)
    shown = t.option * len(episode.options) + t.demo * len(episode.demos)
    nodes = t.head + shown + query * len(episode.queries) + tail
    return [i for node in nodes if node.kind == "tag" for i in markup._tag_ids[node.value]]


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data())
def test_tags_and_slots_are_what_the_template_says_whatever_the_texts_are(kind: str, data: st.DataObject) -> None:
    markup = composer(kind, Template.parse(MARKUP.source.replace("@option", "{task}\n@option") + "@tail\n<demo> end\n"))
    episode = data.draw(adversarial_episodes(most_queries=3 if markup.layout.many_queries else 1))
    prompt = markup.compose(episode)
    first = backbone_of(kind).first_tag_id
    assert [i for i in prompt.ids if i >= first] == ids_of(prompt, "tag") == tag_ids_the_template_says(markup, episode)
    assert sum(slot.is_query for slot in prompt.slots) == len(episode.queries)
    masks = len(episode.queries) if kind in ("bert", "roberta") else 0
    assert ids_of(prompt, "slot") == [markup.layout.mask_id] * masks
    forbidden = markup.encoder.reserved_ids - {markup.encoder.unknown_id}
    assert not forbidden & set(ids_of(prompt, "text", "value", "symbol"))
    assert ids_of(prompt, "special") == [*markup.layout.prefix, *markup.layout.suffix]
    assert (prompt.shortened, prompt.dropped) == (0, 0)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("template", ["markup_letters", "plain_letters_quoted_message", "plain_letters_bare"])
@settings(FAST, max_examples=30)
@given(episode=adversarial_episodes())
def test_texts_and_names_come_through_whole(kind: str, template: str, episode: Episode) -> None:
    markup = composer(kind, Template.load(template))
    prompt = markup.compose(episode)
    values = [markup.encoder.decode(list(ids)) for ids in values_of(prompt)]
    texts = [*(option.name for option in episode.options), *(shown.text for shown in episode.demos + episode.queries)]
    assert [value.removeprefix(" ") for value in values] == [text.strip() for text in texts]


@pytest.mark.parametrize(
    "template", ["markup_letters", "plain_letters_text_label", "plain_letters_quoted_message", "plain_letters_bare"]
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_each_query_of_a_masked_prompt_has_one_mask_at_its_slot(kind: str, template: str) -> None:
    markup = composer(kind, Template.load(template))
    episode = replace(an_episode(), queries=(Query("will it rain", 2), Query("[MASK] <mask>")))
    prompt = markup.compose(episode)
    first, second = (i for i, token in enumerate(prompt.ids) if token == markup.layout.mask_id)
    assert [(s.position, s.answer, s.is_query) for s in prompt.slots] == [(first, 2, True), (second, None, True)]
    assert markup.compose_each(episode) == [prompt]


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@settings(FAST, max_examples=30)
@given(data=st.data())
def test_every_part_of_a_prompt_is_a_segment_and_the_same_wherever_it_stands(
    kind: str, answers: str, data: st.DataObject
) -> None:
    # The head and an option may end in a field that is empty: the space before it must not reach the next part.
    option = "{name} is {symbol}: {description}"
    source = MARKUP.source.replace("@option", "of {task}\n@option").replace(" {symbol}: {name}", option)
    markup = composer(kind, Template.parse(source + "@tail\n<demo> {task}\n"), answers=answers)
    episode = data.draw(adversarial_episodes(most_queries=3))
    episode = replace(episode, task_description=data.draw(st.sampled_from(["", " ", "a bank"])))
    prompt = markup.compose(episode)
    segments = [piece.segment for piece in prompt.pieces for _ in piece.ids]
    parts = [number for number, _ in groupby(segments)]
    queries = [-1 - i for i in range(len(episode.queries))]
    assert parts == [*range(1 + len(episode.options) + len(episode.demos)), *queries, 0]
    assert [segments[slot.position] for slot in prompt.slots] == queries
    for number, query in zip(queries, episode.queries, strict=True):
        single = markup.compose(replace(episode, queries=(query,)))
        assert segment_of(single, -1) == segment_of(prompt, number)
        assert segment_of(single, 0) == segment_of(prompt, 0)
    # Apart from its letter, the last option is written like the first.
    same = episode.options[0]._replace(description=data.draw(st.sampled_from(["", "  ", "a card"])))
    doubled = markup.compose(replace(episode, options=(same, *episode.options, same)))
    first, last = (
        [piece.ids for piece in doubled.pieces if piece.segment == number and piece.kind != "symbol"]
        for number in (1, 2 + len(episode.options))
    )
    assert first == last


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_composed_whole_where_nothing_need_give_way(kind: str, answers: str) -> None:
    episode = an_episode(["card " * 20, "are you open", "this is awful"])
    roomy = composer(kind, answers=answers)
    length = len(roomy.compose(episode).ids)
    room = max(len(roomy.name_ids(name)) for name in NAMES) if answers == "names" else 0
    for limit in range(length - 9, length + room + 3):
        markup = composer(kind, answers=answers, max_length=limit)
        prompt = markup.compose(episode)
        gave_way = prompt.shortened + prompt.dropped > 0
        assert gave_way == (limit < length + room)
        assert markup.compose_whole(episode) == (None if gave_way else prompt)
    if roomy.layout.many_queries:
        both = replace(episode, queries=(*episode.queries, Query("where")))
        length = len(roomy.compose(both).ids) + 2 * room
        assert composer(kind, answers=answers, max_length=length).compose_whole(both) == roomy.compose(both)
        assert composer(kind, answers=answers, max_length=length - 1).compose_whole(both) is None
    with pytest.raises(PromptError, match="query 0 has an empty text"):
        roomy.compose_whole(replace(episode, queries=(Query(" "),)))


@pytest.mark.parametrize(
    "template",
    [
        "markup_letters",
        "plain_letters_text_label",
        "plain_letters_input_category",
        "plain_letters_quoted_message",
        "plain_letters_bare",
    ],
)
def test_a_causal_slot_is_the_position_before_the_answer(template: str) -> None:
    markup = composer("llama", Template.load(template))
    episode = an_episode()
    prompt = markup.compose(episode)
    *shown, query = prompt.slots
    assert [(slot.answer, slot.is_query) for slot in shown] == [(demo.answer, False) for demo in episode.demos]
    assert all(prompt.ids[slot.position + 1] == slot.candidates[slot.answer or 0] for slot in shown)
    assert {slot.candidates for slot in prompt.slots} == {markup.option_symbols(3)}
    assert (query.position, query.is_query, query.answer) == (len(prompt.ids) - 1, True, 1)


@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_a_sequence_to_sequence_prompt_has_one_slot_at_the_decoders_beginning(answers: str) -> None:
    markup = composer("t5", answers=answers)
    (slot,) = (prompt := markup.compose(an_episode())).slots
    assert (slot.position, slot.is_query, slot.answer) == (0, True, 1)
    assert prompt.ids[-1] == markup.encoder.tokenizer.eos_token_id
    assert slot.candidates == (markup.option_symbols(3) if answers == "symbols" else ())


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(names=st.lists(adversarial_text().filter(str.strip), min_size=2, max_size=4), answer=st.integers(0, 1))
def test_a_name_has_the_same_tokens_beside_its_option_and_where_it_answers(
    kind: str, names: list[str], answer: int
) -> None:
    markup = composer(kind, Template.load("markup_words"), answers="names")
    episode = Episode(tuple(map(Option, names)), (Demo("I lost my card", answer),), (Query("when do you open"),))
    prompt = markup.compose(episode)
    shown = [markup.name_ids(name) for name in names]
    texts = [markup.name_ids(text) for text in ("I lost my card", "when do you open")]
    assert values_of(prompt) == [ids for ids in (*shown, texts[0], shown[answer], texts[1]) if ids]
    assert prompt.slots[-1].spaced


def test_the_markup_in_words_is_the_prompt_that_is_assembled_by_hand() -> None:
    markup = composer("llama", Template.load("markup_words"), answers="names")
    tag, encode = (
        markup._tag_ids,
        lambda text: tuple(markup.encoder.tokenizer(text, add_special_tokens=False).input_ids),
    )
    line = encode("\n")
    shown = (*tag["<classification>"], *tag["<options>"])
    for name in NAMES:
        shown += (*line, *encode(f" {name}"))
    for text, name in (("I lost my card", NAMES[0]), ("are you open on Sunday", NAMES[1])):
        shown += (*line, *tag["<demo>"], *tag["<input>"], *encode(f" {text}"), *tag["<label>"], *encode(f" {name}"))
    asked = (*line, *tag["<demo>"], *tag["<input>"], *encode(" when do you open"), *tag["<label>"])
    prompt = markup.compose(an_episode(["I lost my card", "are you open on Sunday"]))
    assert prompt.ids == (*markup.layout.prefix, *shown, *asked)
    assert (prompt.slots[-1].position, prompt.slots[-1].spaced) == (len(prompt.ids) - 1, True)
    assert markup.name_ids(NAMES[0]) == encode(f" {NAMES[0]}")


@pytest.mark.parametrize(
    ("name", "head", "option", "query"),
    [
        ("request_kind", "Task: decide which kind of request this is. Kinds:", " {},", "\nRequest: {}\nKind:"),
        ("text_label", "Classify each text. The possible labels are:", "\n- {}", "\n\nText: {}\nLabel:"),
        (
            "message_category",
            "Choose the category that fits the message best.\nCategories:",
            "\n{}",
            "\nMessage: {}\nCategory:",
        ),
        ("input_output", "Options:", " {};", "\nInput: {}\nOutput:"),
    ],
)
def test_a_prompt_in_plain_words_is_the_text_that_it_reads_as(name: str, head: str, option: str, query: str) -> None:
    markup = composer("llama", Template.load(f"plain_words_{name}"), answers="names")
    demos = [("I lost my card", NAMES[0]), ("are you open on Sunday", NAMES[1])]
    text = head + "".join(map(option.format, NAMES))
    text += "".join(f"{query.format(shown)} {label}" for shown, label in demos) + query.format("when do you open")
    prompt = markup.compose(an_episode([shown for shown, _ in demos]))
    whole = markup.encoder.tokenizer(text, add_special_tokens=False).input_ids
    assert prompt.ids == (*markup.layout.prefix, *whole)
    assert prompt.slots[-1].spaced


@pytest.mark.parametrize("name", shipped_templates("plain_words"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_in_words_shows_all_names_and_asks(kind: str, name: str) -> None:
    markup = composer(kind, Template.load(name), answers="names")
    prompt = markup.compose(an_episode())
    both = {name: {markup.name_ids(name, spaced) for spaced in (True, False)} for name in NAMES}
    *shown, _query = values_of(prompt)
    options, labels = shown[:3], [ids for ids in shown[3:] if any(ids in forms for forms in both.values())]
    assert all(ids in both[name] for ids, name in zip(options, NAMES, strict=True))
    assert labels == [markup.name_ids(name, prompt.slots[-1].spaced) for name in NAMES]


@pytest.mark.parametrize("kind", ["llama", "roberta", "t5"])
def test_a_space_that_is_asked_for_is_written_before_a_tag_and_at_the_end_of_a_part(kind: str) -> None:
    source = MARKUP.source.replace("<demo> <input>", r"<demo>\s<input>").replace("{name}", r"{name}\s")
    markup, without = composer(kind, Template.parse(source)), composer(kind)
    space = tuple(markup.encoder.encode(" "))
    assert space
    prompt, bare = markup.compose(an_episode()), without.compose(an_episode())
    count = len(NAMES) + len(an_episode().demos) + 1
    assert sum(piece.ids == space for piece in prompt.pieces) == count
    assert [piece for piece in prompt.pieces if piece.ids != space] == list(bare.pieces)


def test_a_symbol_is_one_and_the_same_token_wherever_it_stands() -> None:
    for kind in KINDS:
        markup, episode = composer(kind), an_episode()
        candidates = OptionSymbols.find(markup.encoder).take(3)
        shown = [*candidates, *(candidates[demo.answer] for demo in episode.demos)]
        assert ids_of(markup.compose(episode), "symbol") == shown


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_only_masked_prompts_take_several_queries_and_compose_each_splits_the_others(kind: str) -> None:
    markup = composer(kind)
    both = replace(an_episode(), queries=(Query("will it rain", 0), Query("nobody answers", 2)))
    with pytest.raises(PromptError, match=r"takes one query a prompt; use compose_each"):
        markup.compose(both)
    assert markup.compose_each(both) == [markup.compose(replace(both, queries=(query,))) for query in both.queries]


@pytest.mark.parametrize("kind", KINDS)
def test_with_and_without_tags_a_prompt_has_the_same_texts_names_and_symbols(kind: str) -> None:
    plain = Template.parse(re.sub(r"@tag.*\n|[<>]", "", MARKUP.source))
    with_tags, in_words = composer(kind).compose(an_episode()), composer(kind, plain).compose(an_episode())
    shared = ("value", "symbol", "slot", "special")
    assert [p for p in with_tags.pieces if p.kind in shared] == [p for p in in_words.pieces if p.kind in shared]
    assert not ids_of(in_words, "tag")
    assert [(s.candidates, s.answer) for s in with_tags.slots] == [(s.candidates, s.answer) for s in in_words.slots]


@pytest.mark.parametrize("kind", KINDS)
def test_defects_of_an_episode_are_errors_that_say_which(kind: str) -> None:
    markup, good = composer(kind), an_episode()
    broken: dict[str, dict[str, Any]] = {
        r"query 0 has an empty text": {"queries": (Query("  \n"),)},
        r"option 1 has an empty text": {"options": (Option("a"), Option(" ")), "demos": ()},
        r"demonstration 1 has an empty text": {"demos": (Demo("a", 0), Demo("", 1))},
        r"1 option\(s\)": {"options": good.options[:1], "demos": ()},
        r"without a query": {"queries": ()},
        r"demonstration 0 answers option 3 of 3": {"demos": (Demo("a", 3),)},
        r"demonstration 0 answers option -1 of 3": {"demos": (Demo("a", -1),)},
    }
    for message, changes in broken.items():
        with pytest.raises(PromptError, match=message):
            markup.compose(replace(good, **changes))


def test_a_text_that_cannot_be_encoded_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="query 0"):
        composer("bert").compose(replace(MANY, options=MANY.options[:2], queries=(Query("half an emoji \ud83d"),)))


def test_more_options_than_symbols_are_an_error_that_counts_them_and_recommends_names() -> None:
    with pytest.raises(PromptError, match=r"^40 options, but this tokenizer has 26.*answers: names"):
        composer("bert").compose(MANY)


@pytest.mark.parametrize("kind", KINDS)
def test_names_as_answers_lift_the_limit_on_options(kind: str) -> None:
    assert len(composer(kind, UNNUMBERED, answers="names").compose(MANY).slots) == 1
    try:
        composer(kind, answers="names").compose(MANY)
    except PromptError as error:
        assert "answers: names" not in str(error), "the remedy is what was asked for already"


def test_a_template_must_show_what_is_to_be_answered_and_have_a_table_for_its_tags() -> None:
    with pytest.raises(PromptError, match=r"shows no \{symbol\}.*answers: names"):
        composer("bert", UNNUMBERED)
    with pytest.raises(PromptError, match="uses tags, but no tag table"):
        Markup(MARKUP, backbone_of("bert").encoder, backbone_of("bert").layout)


@pytest.mark.parametrize("words", [(SHORTEST_DEMO, 40), (1, 40), (1, 3)])
@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data(), limit=st.integers(30, 220))
def test_a_prompt_that_is_too_long_gives_up_demonstrations_and_nothing_else(
    kind: str, answers: str, words: tuple[int, int], data: st.DataObject, limit: int
) -> None:
    lengths = data.draw(st.lists(st.integers(*words), max_size=8))
    episode = an_episode([f"{'abcdefgh'[i]} {'card ' * n}" for i, n in enumerate(lengths)])
    markup, roomy = composer(kind, answers=answers, max_length=limit), composer(kind, answers=answers)
    bare = roomy.compose(replace(episode, demos=()))
    # A whole name takes the slot's place or follows it: there must be room for the longest.
    room = limit - (max(len(markup.name_ids(name)) for name in NAMES) if answers == "names" else 0)
    try:
        prompt = markup.compose(episode)
    except PromptError as error:
        assert len(bare.ids) > room
        assert f"needs {len(bare.ids)} tokens without any demonstration, but the limit is {room}" in str(error)
        return
    assert len(prompt.ids) <= room
    values, texts = values_of(prompt), [roomy._text_ids(demo.text) for demo in episode.demos]
    assert (values[:3], values[-1]) == (values_of(bare)[:3], values_of(bare)[-1])
    fewer = replace(episode, demos=episode.demos[prompt.dropped :])
    assert ids_of(prompt, "tag") == tag_ids_the_template_says(markup, fewer)
    assert ids_of(prompt, "slot", "special") == ids_of(bare, "slot", "special")
    assert prompt.slots[-1].candidates == bare.slots[-1].candidates
    shown = values[3:-1:2] if answers == "names" else values[3:-1]
    kept = [next(i for i, text in enumerate(texts) if text[: len(cut)] == cut) for cut in shown]
    assert kept == sorted(set(kept))
    assert prompt.dropped == len(texts) - len(kept)
    assert prompt.shortened == sum(len(cut) < len(texts[i]) for i, cut in zip(kept, shown, strict=True))
    assert all(len(cut) >= min(SHORTEST_DEMO, len(texts[i])) for i, cut in zip(kept, shown, strict=True))
    if prompt.shortened:
        assert room - len(prompt.ids) < prompt.shortened, "more was cut than needed"
    if prompt.dropped:
        counts = [sum(i % 3 == label for i in kept) for label in range(min(3, len(texts)))]
        assert max(counts) - min(counts) <= 1, "the labels give up demonstrations in turn"
        alone = [len(roomy.compose(replace(episode, demos=(demo,))).ids) - len(bare.ids) for demo in episode.demos]
        least = [n - max(len(text) - SHORTEST_DEMO, 0) for n, text in zip(alone, texts, strict=True)]
        lost = max(n for i, n in enumerate(least) if i not in kept)
        assert len(bare.ids) + sum(least[i] for i in kept) + lost > room, "one more would have fitted"


@pytest.mark.parametrize("template", ["plain_letters_arrow", "plain_letters_quoted_message", "plain_letters_bare"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_holds_where_no_space_stands_before_a_text(kind: str, template: str) -> None:
    episode = an_episode(["日本語" * 8, "?!" * 20, "card " * 20])
    roomy = composer(kind, Template.load(template))
    whole, bare = roomy.compose(episode), roomy.compose(replace(episode, demos=()))
    for limit in range(len(bare.ids), len(whole.ids)):
        prompt = composer(kind, roomy.template, max_length=limit).compose(episode)
        assert len(prompt.ids) <= limit
        if not prompt.dropped:
            assert prompt.shortened == sum(a != b for a, b in zip(values_of(prompt), values_of(whole), strict=True))
