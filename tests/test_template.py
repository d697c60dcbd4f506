"""The template language: every mistake has a place, spaces settle, and source and template agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_markup.errors import TemplateError
from icl_markup.template import Node, Template, shipped_templates
from tests.test_text import SPECIALS, SYNTAX, TAGS

FAST = settings(max_examples=60, deadline=None, derandomize=True)

GOOD = """# a comment that names no tag
@tag <options> width=3 "the labels"
@tag <demo>
@head
 Sort the text. {task} <options>
@option
 {symbol}: {name}
@demo
<demo> {text} is {label}
@query
<demo> {text} is {label}
"""
ENDING = "@option\n {symbol}: {name}\n@demo\n {text} {label}\n@query\n {text} {label}\n"


def parts(nodes: tuple[Node, ...]) -> list[str]:
    return [node.value if node.kind != "field" else f"{{{node.value}}}" for node in nodes]


def head_of(text: str, tags: str = "") -> list[str]:
    return parts(Template.parse(f"{tags}@head\n{text}\n{ENDING}").head)


MISTAKES = {
    "undeclared tag": (GOOD.replace("<demo> {text}", "<dmo> {text}", 1), "9:1", r"<dmo>.*did you mean '<demo>'"),
    "undeclared tag, inside a line": (GOOD.replace("{task} <options>", "{task} <x>"), "5:24", "<x> is not declared"),
    "unknown section": (GOOD.replace("@query", "@qury"), "10:1", r"unknown section '@qury'.*did you mean 'query'"),
    "unknown section, indented": (GOOD.replace("@query", "  @qury"), "10:3", "unknown section"),
    "a section's line with text": (GOOD.replace("@query", "@query <demo>"), "10:1", "unknown section"),
    "unknown field": (GOOD.replace("{name}", "{nmae}"), "7:12", r"@option.*\{nmae\}.*did you mean 'name'.*\{symbol\}"),
    "a field of another section": (
        GOOD.replace("{task}", "{label}"),
        "5:17",
        r"@head has no field \{label\}.*\{task\}",
    ),
    "an empty field": (GOOD.replace("{task}", "{}"), "5:17", r"no field \{\}"),
    "missing option section": (GOOD.replace("@option\n {symbol}: {name}\n", ""), "10:1", "@option is missing"),
    "missing query section": (GOOD.split("@query", maxsplit=1)[0], "10:1", "@query is missing"),
    "missing label field": (GOOD.replace("is {label}\n@query", "\n@query"), "8:1", r"@demo lacks the field \{label\}"),
    "missing text field": (GOOD.replace("<demo> {text} is {label}\n@q", "<demo> {label}\n@q"), "8:1", r"\{text\}"),
    "missing name field": (GOOD.replace("{name}", "x"), "6:1", r"@option lacks the field \{name\}"),
    "field twice": (GOOD.replace("<demo> {text} is", "<demo> {text} {text} is", 1), "9:15", "twice in @demo"),
    "duplicate tag": (GOOD.replace("@tag <demo>", "@tag <options>"), "3:6", "<options> is declared twice"),
    "width of zero": (GOOD.replace("width=3", "width=0"), "2:16", "width=0 is no whole number from 1 to 1000"),
    "negative width": (GOOD.replace("width=3", "width=-1"), "2:16", "width=-1"),
    "width too large": (GOOD.replace("width=3", "width=1001"), "2:16", "width=1001"),
    "fractional width": (GOOD.replace("width=3", "width=1.5"), "2:16", "width=1.5"),
    "width in words": (GOOD.replace("width=3", "width=two"), "2:16", "width=two"),
    "width in other digits": (GOOD.replace("width=3", "width=\u00b2"), "2:16", "width=\u00b2"),
    "width of thousands of digits": (GOOD.replace("width=3", "width=" + "9" * 5000), "2:16", "width=999"),
    "malformed tag line": (GOOD.replace("@tag <demo>", "@tag demo"), "3:1", "expected: @tag"),
    "description without its end": (GOOD.replace('labels"', "labels"), "2:1", "expected: @tag"),
    "tag name with a digit first": (GOOD.replace("<options>", "<1>"), "2:6", "<1> is no tag name"),
    "lone brace": (GOOD.replace("Sort the", "Sort } the"), "5:7", r"a lone \}; write \\\}"),
    "brace never closed": (GOOD.replace("{task}", "{task"), "5:17", r"a lone \{"),
    "unknown escape": (GOOD.replace("Sort", r"\Sort"), "5:2", r"unknown escape \\S.*\\n"),
    "a backslash at the end": (GOOD.replace("<options>\n@opt", "<options>\\\n@opt"), "5:33", r"a lone \\"),
    "text before a section": (GOOD.replace("@head\n", ""), "4:1", "text before the first section"),
    "unused tag": (GOOD.replace("{task} <options>", "{task}"), "2:1", "<options> is declared but not used"),
    "section twice": (GOOD + "@demo\n {text} {label}\n", "12:1", "@demo stands twice"),
    "nothing at all": ("", "1:1", "@option is missing"),
}


@pytest.mark.parametrize(("source", "place", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_reported_with_file_line_and_column(source: str, place: str, message: str) -> None:
    with pytest.raises(TemplateError, match=rf"(?s)^mine:{place}: .*{message}"):
        Template.parse(source, "mine")


def test_an_unused_tag_is_reported_where_it_is_declared_and_not_where_a_comment_names_it() -> None:
    source = "# <gone> is for later\n@tag <gone>\n" + ENDING
    with pytest.raises(TemplateError, match=r"^mine:2:1: tag <gone> is declared but not used"):
        Template.parse(source, "mine")


def test_spaces_and_line_breaks_are_one_space_and_none_before_a_tag() -> None:
    tag = "@tag <a>\n"
    assert head_of("one  \t two\n\n   three") == ["one two three"]
    assert head_of("one   <a>", tag) == ["one", "<a>"]
    assert head_of("one\n<a>\n two", tag) == ["one", "<a>", " two"]
    assert head_of("   <a>   <a>   two  ", tag) == ["<a>", "<a>", " two"]
    assert head_of("{task}\n<a> {task}", tag) == ["{task}", "<a>", " ", "{task}"]
    assert head_of("# a comment\none\n  # another\ntwo") == ["one two"]
    assert Template.parse(ENDING).demo == (
        Node("text", " "),
        Node("field", "text"),
        Node("text", " "),
        Node("field", "label"),
    )


def test_a_newline_that_is_asked_for_stays_and_swallows_the_space_after_it() -> None:
    assert head_of(r"one\ntwo") == ["one\ntwo"]
    assert head_of("one\\n\ntwo") == ["one\ntwo"]
    assert head_of(r"one\n\n<a>", "@tag <a>\n") == ["one\n\n", "<a>"]
    assert head_of(r"one\n") == ["one\n"]


@pytest.mark.parametrize("character", list("<{}@#\\"))
def test_an_escaped_character_is_that_character(character: str) -> None:
    assert head_of(f"a \\{character} b") == [f"a {character} b"]
    assert head_of(f"\\{character}b") == [f"{character}b"]


def test_an_escaped_tag_or_field_is_plain_text() -> None:
    template = Template.parse(f"@tag <a>\n@head\n\\<a> and <a> and \\{{task\\}}\n{ENDING}")
    assert template.head == (Node("text", "<a> and"), Node("tag", "<a>"), Node("text", " and {task}"))
    assert head_of("a < b, 1 <2> 3") == ["a < b, 1 <2> 3"], "what is no tag name needs no escape"


def test_an_escaped_tab_stays_a_tab() -> None:
    assert head_of(r"one\ttwo") == ["one\ttwo"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"one\s<a>", ["one ", "<a>"]),
        (r"\s<a>", [" ", "<a>"]),
        (r"\n\s<a>", ["\n ", "<a>"]),
        (r"\n \s<a>", ["\n ", "<a>"]),
        (r"one\s\s<a>", ["one  ", "<a>"]),
        (r"<a>one\s", ["<a>", "one "]),
        (r"<a>\n\s{task}", ["<a>", "\n ", "{task}"]),
        ("<a>one\\n\n\\stwo", ["<a>", "one\n two"]),
    ],
)
def test_a_space_that_is_asked_for_stays_before_a_tag_after_a_newline_and_at_the_end(
    text: str, expected: list[str]
) -> None:
    assert head_of(text, "@tag <a>\n") == expected


def test_a_template_knows_its_tags_widths_and_descriptions() -> None:
    template = Template.parse(GOOD, "mine")
    assert [(t.name, t.width, t.description) for t in template.tags] == [
        ("<options>", 3, "the labels"),
        ("<demo>", 1, "demo"),
    ]
    assert not template.is_plain
    assert template.shows_symbols
    assert Template.parse(ENDING).is_plain
    assert not Template.parse(ENDING.replace("{symbol}: ", "")).shows_symbols


@pytest.mark.parametrize("name", shipped_templates())
def test_every_shipped_template_loads_and_parses_to_itself(name: str) -> None:
    template = Template.load(name)
    assert Template.parse(template.source, template.name) == template
    assert template.is_plain == name.startswith("plain_")
    assert template.shows_symbols == ("letters" in name)
    assert Node("field", "label") in template.query


def test_the_wordings_in_plain_words_all_differ() -> None:
    words, letters = shipped_templates("plain_words"), shipped_templates("plain_letters")
    assert (len(words), len(letters)) == (12, 6)
    assert sorted(words + letters) == shipped_templates("plain")

    def body(name: str) -> tuple[tuple[str, ...], ...]:
        t = Template.load(name)
        return tuple(tuple(" ".join(parts(s)).lower().split()) for s in (t.head, t.option, t.demo, t.query, t.tail))

    for names in (words, letters):
        bodies = [body(name) for name in names]
        assert len({(head, option) for head, option, *_ in bodies}) == len(names)
        assert len({demo for _, _, demo, *_ in bodies}) == len(names), "two wordings have one demonstration"
    for name in words + letters:
        template = Template.load(name)
        assert template.query == template.demo, "a query is written like a demonstration"


@pytest.mark.parametrize("source", [GOOD, Template.load("markup_letters").source])
def test_with_width_changes_widths_and_nothing_else(source: str) -> None:
    template = Template.parse(source, "mine")
    wider = template.with_width(7)
    assert {tag.width for tag in wider.tags} == {7}
    assert [(t.name, t.description) for t in wider.tags] == [(t.name, t.description) for t in template.tags]
    assert (wider.head, wider.option, wider.demo, wider.query) == (
        template.head,
        template.option,
        template.demo,
        template.query,
    )
    assert Template.parse(wider.source, "mine") == wider
    for width in (0, -1, 1001):
        with pytest.raises(TemplateError, match=f"width={width}"):
            template.with_width(width)


def test_with_width_leaves_text_under_a_tag_line_alone() -> None:
    template = Template.parse(f"@head\n@tag <a>\nwidth=3 is <a>\n{ENDING}")
    assert template.with_width(2).head == template.head == (Node("text", "width=3 is"), Node("tag", "<a>"))
    separated = Template.parse(template.source.replace("\n", "\u2028"))
    assert [tag.width for tag in separated.with_width(2).tags] == [2], "a line separator ends a line here too"


def test_an_unknown_name_suggests_the_nearest_and_lists_what_ships() -> None:
    with pytest.raises(
        TemplateError,
        match=r"no template 'markup_leters'; did you mean 'markup_letters'.*plain_letters_text_label.*\.tmpl",
    ):
        Template.load("markup_leters")


def test_a_file_loads_by_its_path_and_a_missing_or_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.tmpl"
    with pytest.raises(TemplateError, match=r"mine\.tmpl: no such template file"):
        Template.load(path)
    path.write_text(GOOD, encoding="utf-8")
    assert Template.load(path) == Template.load(str(path)) == Template.parse(GOOD, str(path))
    path.write_text(GOOD.replace("{task}", "{tsk}"), encoding="utf-8")
    with pytest.raises(TemplateError, match=r"mine\.tmpl:5:17: "):
        Template.load(path)
    path.write_bytes(b"@head\n\xff\xfe")
    with pytest.raises(TemplateError, match=r"mine\.tmpl: not UTF-8"):
        Template.load(path)


def test_a_folder_that_is_called_like_a_shipped_template_is_not_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "markup_letters").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(Template.load("markup_letters").tags) == 5


_LINES = [
    *GOOD.splitlines(),
    *ENDING.splitlines(),
    "@tail",
    "@tag",
    "@tag <x> width=",
    "@tag <x> width=9 ",
    "\x0b@",
    "\r",
]
_SOURCES = st.lists(
    st.one_of(st.sampled_from(_LINES), st.sampled_from(TAGS + SPECIALS + SYNTAX), st.text(max_size=8)), max_size=16
)


@settings(FAST, max_examples=300)
@given(
    pieces=_SOURCES,
    between=st.sampled_from(["\n", "\n", "\r\n", "", " ", "\u2028"]),
    prefix=st.sampled_from(["", GOOD]),
)
def test_parsing_any_text_succeeds_or_is_a_template_error(pieces: list[str], between: str, prefix: str) -> None:
    source = prefix + between.join(pieces)
    try:
        template = Template.parse(source, "fuzz")
    except TemplateError as error:
        assert str(error).startswith("fuzz:")
    else:
        assert Template.parse(template.source, "fuzz") == template
