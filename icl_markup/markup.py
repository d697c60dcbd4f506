"""The composer: an episode and a template become a prompt, assembled from token ids piece by piece.

Every piece is encoded by itself by a `TextEncoder` that knows no special tokens, so no text of a user can
become a tag, a mask or a slot, whatever it contains.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from heapq import heapify, heappop, heapreplace
from typing import Any, Protocol

from icl_markup.answers import Answers, OptionSymbols
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import PromptError
from icl_markup.layout import Layout
from icl_markup.prompt import HEAD, Piece, Prompt, Slot
from icl_markup.template import Node, Template
from icl_markup.text import TextEncoder, is_encodable

LONGEST_KEPT = 4096
"""The ids of texts of at most so many characters are kept for prompts to come, those of some thousand texts."""

_LABEL = Node("field", "label")
SHORTEST_DEMO = 8
"""Demonstrations are shortened to no fewer tokens than this before any of them is dropped."""


class TagIds(Protocol):
    """Where the soft tokens of tags lie: a `TagTable`, or an exported vocabulary (`icl_markup.placement`)."""

    def ids(self, name: str) -> list[int]:
        """Return the ids of a tag's soft tokens."""


class Markup:
    """Composes prompts of one template for one backbone.

    Args:
        template: the template.
        encoder: the backbone's tokenizer as a `TextEncoder`.
        layout: what the kind of backbone puts around a prompt, and where its slots are.
        table: the ids of the tags' soft tokens; None for a template in plain words.
        answers: ``symbols``: the slot is answered with an option's letter; ``names``: with its whole name.
        max_length: the longest prompt in tokens.

    Raises:
        PromptError: the template needs a tag that `table` lacks, or symbols that it does not show.
    """

    def __init__(
        self,
        template: Template,
        encoder: TextEncoder,
        layout: Layout,
        table: TagIds | None = None,
        *,
        answers: Answers = "symbols",
        max_length: int = 512,
    ):
        if template.tags and table is None:
            raise PromptError(f"template {template.name!r} uses tags, but no tag table was given")
        if answers == "symbols" and not template.shows_symbols:
            raise PromptError(
                f"template {template.name!r} shows no {{symbol}} beside an option; add it, or use answers: names"
            )
        self.template = template
        self.encoder = encoder
        self.layout = layout
        self.answers: Answers = answers
        self.max_length = max_length
        self._tag_ids = {tag.name: tuple(table.ids(tag.name)) for tag in template.tags} if table else {}
        self._symbols = OptionSymbols.find(encoder) if template.shows_symbols else None
        self._answers_bare = layout.answer_spaced is False and self._symbols is not None and self._symbols.spaced
        self._slot_symbols = self._symbols.without_space(encoder) if self._answers_bare and self._symbols else ()
        self._spaced_text = _has_space_before(template.demo, Node("field", "text"))
        self._cache()

    def _cache(self) -> None:
        encode = self.encoder.encode
        short = lru_cache(maxsize=4096)(lambda text: tuple(encode(text)))
        self._encode: Callable[[str], tuple[int, ...]] = lambda text: (
            short(text) if len(text) <= LONGEST_KEPT else tuple(encode(text))
        )
        self._opening = lru_cache(maxsize=8)(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_encode", "_opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._cache()

    def compose(self, episode: Episode) -> Prompt:
        """Compose one prompt that holds every query of `episode`.

        A prompt that is too long has its demonstrations shortened, longest first, to no fewer than
        `SHORTEST_DEMO` tokens each; if that is not enough, demonstrations are dropped, the last of the label
        that has most. Tags, options, queries and slots stay; the prompt counts what was shortened and dropped.

        Raises:
            PromptError: a text is empty, the kind takes one query a prompt, there are more options than
                symbols, or the prompt does not fit even without demonstrations.
        """
        self.check(episode)
        prompt = self._assemble(episode, [None] * len(episode.demos))
        limit = self.max_length - self._reserve(episode, prompt)
        if len(prompt.ids) <= limit:
            return prompt
        texts = [self._text_ids(demo.text) for demo in episode.demos]
        fixed = len(prompt.ids) - sum(map(len, texts))
        overhead = _demo_overhead(prompt, len(episode.options), [len(ids) for ids in texts])
        order = _drop_order(episode.demos)

        def cap_without(dropped: int) -> int | None:
            """Return the length that demonstrations are cut to where so many are dropped, None where that won't do."""
            room = limit - fixed + sum(overhead[i] for i in order[:dropped])
            lengths = [len(texts[i]) for i in order[dropped:]]
            cap = _common_cap(lengths, room)
            return None if cap is None or cap < min(SHORTEST_DEMO, max(lengths, default=0)) else cap

        # With one more dropped, the others have more room: as few are dropped as possible, found by halving.
        fewest = bisect_left(range(len(order)), True, key=lambda dropped: cap_without(dropped) is not None)
        cap = cap_without(fewest)
        if cap is None:
            raise PromptError(
                f"the prompt needs {len(prompt.ids) - sum(overhead) - sum(map(len, texts))} tokens without any "
                f"demonstration, but the limit is {limit}; offer fewer options or shorten the text"
            )
        kept = sorted(order[fewest:])
        shorter = replace(episode, demos=tuple(episode.demos[i] for i in kept))
        caps: list[int | None] = [cap if len(texts[i]) > cap else None for i in kept]
        return replace(
            self._assemble(shorter, caps),
            shortened=sum(c is not None for c in caps),
            dropped=len(texts) - len(kept),
        )

    def compose_whole(self, episode: Episode) -> Prompt | None:
        """Compose one prompt that holds every query and every demonstration whole, or return None if it is too long.

        Where whole names answer, there is room for the longest at every slot. Errors are those of `compose`.
        """
        self.check(episode)
        prompt = self._assemble(episode, [None] * len(episode.demos))
        length = len(prompt.ids) + len(prompt.slots) * self._reserve(episode, prompt)
        return prompt if length <= self.max_length else None

    def room(self, prompt: Prompt, episode: Episode) -> int:
        """Return how many tokens longer a prompt of one query might be, room for a whole name at its slot aside."""
        return self.max_length - len(prompt.ids) - self._reserve(episode, prompt)

    def compose_each(self, episode: Episode) -> list[Prompt]:
        """Compose the queries of `episode`: in one prompt where the kind allows several, else in one each."""
        if self.layout.many_queries or len(episode.queries) == 1:
            return [self.compose(episode)]
        return [self.compose(replace(episode, queries=(query,))) for query in episode.queries]

    def option_symbols(self, count: int) -> tuple[int, ...]:
        """Return the token ids of the first `count` option symbols."""
        if self._symbols is None:
            raise PromptError(f"template {self.template.name!r} shows no option symbols")
        return self._symbols.take(count)

    def slot_symbols(self, count: int) -> tuple[int, ...]:
        """Return the token ids by which a query's slot is answered: in a chat, symbols that have no space in them."""
        symbols = self.option_symbols(count)
        return self._slot_symbols[:count] if self._answers_bare else symbols

    def name_ids(self, name: str, spaced: bool = True) -> tuple[int, ...]:
        """Return the ids of an option's whole name at a slot, with a space before it or without."""
        return self._encode(f" {name.strip()}" if spaced else name.strip())

    @property
    def most_options(self) -> int | None:
        """The number of options that the symbols suffice for; None where whole names answer."""
        return None if self.answers == "names" or self._symbols is None else len(self._symbols.ids)

    def check(self, episode: Episode) -> None:
        """Look for defects of an episode that no prompt can be composed of.

        Raises:
            PromptError: as in `compose`, all but the last; the message says which text it is.
        """
        if len(episode.options) < 2:
            raise PromptError(f"{len(episode.options)} option(s); a prompt needs two or more")
        if not episode.queries:
            raise PromptError("an episode without a query has nothing to ask")
        if len(episode.queries) > 1 and not self.layout.many_queries:
            raise PromptError(f"a {self.layout.kind} backbone takes one query a prompt; use compose_each")
        for i, query in enumerate(episode.queries):
            _check_text(f"query {i}", query.text)
        if self.answers == "symbols":
            self.option_symbols(len(episode.options))
        _check_shown(episode.options, episode.demos)

    def _reserve(self, episode: Episode, prompt: Prompt) -> int:
        """Return the room to keep for a whole name: it takes the slot's place (masked) or follows it (causal)."""
        if self.answers == "symbols":
            return 0
        return max(len(self.name_ids(option.name, prompt.slots[-1].spaced)) for option in episode.options)

    def _text_ids(self, text: str) -> tuple[int, ...]:
        """Encode a demonstration's text as the template writes it, with a space before it or without."""
        return self._encode(f" {text.strip()}" if self._spaced_text else text.strip())

    def _opened(
        self,
        options: tuple[Option, ...],
        demos: tuple[Demo, ...],
        caps: tuple[int | None, ...],
        task: str,
        shows_options: bool,
    ) -> _Assembly:
        """Write what stands before the queries; prompts of the same options and demonstrations have it in common."""
        out = _Assembly(self, options)
        template = self.template
        out.section(template.head, {"task": task})
        for i, option in enumerate(options if shows_options else ()):
            out.begin(i + 1)
            out.section(
                template.option, {"name": option.name, "description": option.description or option.name}, option=i
            )
        for i, (demo, cap) in enumerate(zip(demos, caps, strict=True)):
            out.begin(len(options) + 1 + i)
            out.section(template.demo, {"text": demo.text}, option=demo.answer, cap=cap)
        return out

    def _assemble(self, episode: Episode, caps: Sequence[int | None]) -> Prompt:
        out = self._opening(
            episode.options, episode.demos, tuple(caps), episode.task_description, episode.shows_options
        ).copied()
        template = self.template
        for number, query in enumerate(episode.queries, start=1):
            out.begin(-number)
            out.section(template.query, {"text": query.text}, query=query)
        # The tail is every query's, and not only the last one's.
        out.begin(HEAD)
        if not self.layout.stops_at_slot:
            out.section(template.tail, {"task": episode.task_description})
        return out.finish()


def _check_text(place: str, text: str) -> None:
    if not text.strip():
        raise PromptError(f"{place} has an empty text")
    if not is_encodable(text):
        raise PromptError(f"{place} holds half of a surrogate pair, which is no text; remove it")


@lru_cache(maxsize=8)
def _check_shown(options: tuple[Option, ...], demos: tuple[Demo, ...]) -> None:
    """Check what many queries' prompts have in common, once."""
    for i, demo in enumerate(demos):
        _check_text(f"demonstration {i}", demo.text)
        if not 0 <= demo.answer < len(options):
            raise PromptError(f"demonstration {i} answers option {demo.answer} of {len(options)}")
    for i, option in enumerate(options):
        _check_text(f"option {i}", option.name)


def _has_space_before(nodes: Sequence[Node], field: Node) -> bool:
    before = nodes[: nodes.index(field)]
    return bool(before) and before[-1].kind == "text" and before[-1].value.endswith(" ")


def _common_cap(lengths: list[int], room: int) -> int | None:
    """Return the largest cap such that the lengths, each cut to it, fit into `room`; None where none does."""
    if room < 0 or (lengths and room < len(lengths)):
        return None
    remaining, left = room, len(lengths)
    for length in sorted(lengths):
        if length * left > remaining:
            return remaining // left
        remaining, left = remaining - length, left - 1
    return max(lengths, default=0)


def _demo_overhead(prompt: Prompt, options: int, lengths: Sequence[int]) -> list[int]:
    """Return how many tokens each demonstration takes besides its text; its segment is its own (`_opened`)."""
    taken: Counter[int] = Counter()
    for piece in prompt.pieces:
        taken[piece.segment] += len(piece.ids)
    return [taken[options + 1 + i] - length for i, length in enumerate(lengths)]


def _drop_order(demos: Sequence[Demo]) -> list[int]:
    """Return demonstrations in the order in which they are dropped: the last of the label that has most left."""
    left: dict[int, list[int]] = {}
    for i, demo in enumerate(demos):
        left.setdefault(demo.answer, []).append(i)
    heap = [(-len(places), -places[-1], answer) for answer, places in left.items()]
    heapify(heap)
    order = []
    while heap:
        answer = heap[0][2]
        order.append(left[answer].pop())
        if left[answer]:
            heapreplace(heap, (-len(left[answer]), -left[answer][-1], answer))
        else:
            heappop(heap)
    return order


class _Assembly:
    """A prompt in the making."""

    def __init__(self, markup: Markup, options: Sequence[Option]):
        self.markup = markup
        self.options = options
        self.pieces: list[Piece] = []
        self.slots: list[Slot] = []
        self.length = 0
        self.segment = HEAD
        self.space = False
        self.stopped = False
        self._add("special", markup.layout.prefix)
        self.space = markup.layout.space

    def copied(self) -> _Assembly:
        """Return a copy, which is continued by itself."""
        other = copy(self)
        other.pieces, other.slots = list(self.pieces), list(self.slots)
        return other

    def _add(self, kind: str, ids: Sequence[int]) -> None:
        if ids:
            self.pieces.append(Piece(kind, tuple(ids), self.segment))
            self.length += len(ids)

    def begin(self, segment: int) -> None:
        """Begin a segment; no space is left over from the one before, or its tokens would depend on it."""
        self.segment, self.space = segment, False

    def section(
        self,
        nodes: Sequence[Node],
        values: dict[str, str],
        *,
        option: int | None = None,
        cap: int | None = None,
        query: Query | None = None,
    ) -> None:
        """Write one section. `option` is the option it shows or answers; `query` makes its label a slot."""
        ends = nodes.index(_LABEL) if query and self.markup.layout.trims else 0
        for place, node in enumerate(nodes, start=1):
            if self.stopped:
                return
            if node.kind == "tag":
                self.space = False
                self._add("tag", self.markup._tag_ids[node.value])
            elif node.kind == "text":
                # Spaces before a tag and at the end were asked for, or the template would not have kept them.
                whole = place == len(nodes) or nodes[place].kind == "tag"
                self._literal(node.value.rstrip() if place == ends else node.value, whole)
            elif node.value == "label":
                self._slot(query) if query else self._answer(option)
            elif node.value == "symbol" and option is not None:
                self._option_symbol(option)
            else:
                self._value(values[node.value], cap if node.value == "text" else None)

    def _literal(self, text: str, whole: bool) -> None:
        """Write text of the template; the space at its end goes into the next value's tokens unless it is `whole`."""
        if self.markup.layout.trims and all(piece.kind == "special" for piece in self.pieces):
            text = text.lstrip()
        if not text:
            return
        if self.space:
            text = " " + text.removeprefix(" ")
        self.space = text.endswith(" ") and not whole
        self._add("text", self.markup._encode(text[:-1] if self.space else text))

    def _value(self, value: str, cap: int | None) -> None:
        value = value.strip()
        if not value:
            return
        ids = self.markup._encode(f" {value}" if self.space else value)
        self.space = False
        self._add("value", ids[:cap])

    def _option_symbol(self, option: int) -> None:
        """Show an option's symbol; where names answer, options beyond the last symbol are numbered instead."""
        symbols = self.markup._symbols
        if symbols is None or option < len(symbols.ids):
            self._symbol(self.markup.option_symbols(option + 1)[option])
        else:
            self._value(str(option + 1), None)

    def _symbol(self, symbol: int) -> None:
        self._space_before_symbol()
        self._add("symbol", (symbol,))

    def _space_before_symbol(self) -> None:
        """Write a space of its own where the symbols' tokens have none in them."""
        symbols = self.markup._symbols
        if symbols is not None and not symbols.spaced and self.space and self.markup.encoder.marks_spaces:
            self._add("text", self.markup._encode(" "))
        self.space = False

    def _answer(self, option: int | None) -> None:
        """Write a demonstration's label; in a causal model its first token is predicted one position before."""
        if option is None:
            raise PromptError("a demonstration has no answer")
        if self.markup.answers == "names":
            self._value(self.options[option].name, None)
            return
        candidates = self.markup.option_symbols(len(self.options))
        self._symbol(candidates[option])
        if self.markup.layout.kind == "causal":
            self.slots.append(Slot(self.length - 2, candidates, option, is_query=False))

    def _slot(self, query: Query) -> None:
        layout = self.markup.layout
        names, spaced = self.markup.answers == "names", self.space
        candidates = () if names else self.markup.slot_symbols(len(self.options))
        if layout.answer_spaced is not None:
            spaced = layout.answer_spaced
        elif not names:
            self._space_before_symbol()
        self.space = False
        if layout.stops_at_slot:
            self.stopped = True
        else:
            self._add("slot", (layout.mask_id,))
        self.slots.append(Slot(self.length - 1, candidates, query.answer, is_query=True, spaced=spaced))

    def finish(self) -> Prompt:
        layout = self.markup.layout
        self._add("special", layout.suffix)
        slots = self.slots
        if layout.answer_spaced and slots[-1].candidates:
            self.space = True
            self._space_before_symbol()
        if layout.stops_at_slot:
            # What follows the last query (a generation prompt, T5's </s>) stands before the answer: the slot
            # is the last position, or the first of the decoder.
            position = 0 if layout.kind == "seq2seq" else self.length - 1
            slots = [*slots[:-1], replace(slots[-1], position=position)]
        return Prompt(tuple(self.pieces), tuple(slots))
