"""How a prompt is answered: with an option's symbol, a single token (A, B, C …), or with its whole name."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

from icl_markup.errors import BackboneError, PromptError
from icl_markup.layout import Kind
from icl_markup.text import TextEncoder

Answers = Literal["symbols", "names"]
AnswersChoice = Literal["auto", "symbols", "names"]

AUTO = "auto"
"""The template that goes with the answers."""

BINDS_LETTERS = 3_000_000_000
"""Causal models of fewer weights answer in words by default: asked for letters, they say "A" to everything."""

LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
"""Symbols in order of preference; where a capital is no single token, a small letter comes in at the end."""

MOST_OPTIONS = 26
"""As many symbols as a prompt may show; more options are scored by their names."""

ENOUGH_CAPITALS = 20
"""With so many capitals after a space, that form is taken even if a few letters are missing (T5 lacks two)."""


def default_answers(kind: Kind, parameters: int) -> Answers:
    """Return how a backbone answers by default.

    A masked model reads a symbol in one place, and a name only by guessing all of its tokens at once. Other models
    answer with names, unless they are large enough to bind letters to options, which is cheaper.
    """
    if kind == "masked":
        return "symbols"
    return "symbols" if kind == "causal" and parameters >= BINDS_LETTERS else "names"


def default_wording(answers: Answers) -> str:
    """Return the name of the template in plain words that stands in for the default markup where nothing is chosen."""
    return "plain_letters_text_label" if answers == "symbols" else "plain_words_text_label"


def default_template(answers: Answers) -> str:
    """Return the name of the default markup that goes with these answers."""
    return "markup_letters" if answers == "symbols" else "markup_words"


@dataclass(frozen=True)
class OptionSymbols:
    """Letters that are single, distinct tokens of one tokenizer.

    Attributes:
        letters: the letters as shown.
        ids: their token ids. The same id writes the letter beside its option, after a demonstration, and
            answers at the slot: " A" and "A" are different tokens in most tokenizers, and a model that is to
            copy a symbol must meet one and the same everywhere.
        spaced: whether the ids are those of the letter with a space before it.
    """

    letters: tuple[str, ...]
    ids: tuple[int, ...]
    spaced: bool

    @classmethod
    def find(cls, encoder: TextEncoder) -> OptionSymbols:
        """Find the symbols of a tokenizer: letters after a space if enough of those are single tokens, else bare.

        Raises:
            BackboneError: fewer than two letters are single tokens of the tokenizer.
        """
        spaced, bare = cls._singles(encoder, True), cls._singles(encoder, False)
        best = spaced if spaced.capitals >= ENOUGH_CAPITALS or spaced.capitals >= bare.capitals else bare
        if len(best.ids) < 2:
            raise BackboneError(
                "the tokenizer has no single tokens for the letters A, B, …; score whole names with answers: names"
            )
        return best

    @classmethod
    def _singles(cls, encoder: TextEncoder, spaced: bool) -> OptionSymbols:
        found: dict[int, str] = {}
        for letter in LETTERS:
            ids = encoder.encode(f" {letter}" if spaced else letter)
            if len(ids) == 1 and ids[0] != encoder.unknown_id and ids[0] not in found:
                found[ids[0]] = letter
            if len(found) == MOST_OPTIONS:
                break
        return cls(tuple(found.values()), tuple(found), spaced and encoder.marks_spaces)

    def without_space(self, encoder: TextEncoder) -> tuple[int, ...]:
        """Return the ids of the same letters as they answer where no space stands before them.

        They are those of `ids` where not all letters are single, distinct tokens without a space.
        """
        bare = [encoder.encode(letter) for letter in self.letters]
        found = {ids[0] for ids in bare if len(ids) == 1} - {encoder.unknown_id}
        return tuple(ids[0] for ids in bare) if len(found) == len(self.ids) else self.ids

    @property
    def capitals(self) -> int:
        """How many of the symbols are capital letters."""
        return sum(letter.isupper() for letter in self.letters)

    def take(self, count: int) -> tuple[int, ...]:
        """Return the ids of the first `count` symbols.

        Raises:
            PromptError: there are fewer symbols than that.
        """
        if count > len(self.ids):
            raise PromptError(
                f"{count} options, but this tokenizer has {len(self.ids)} option symbols "
                f"({self.letters[0]} to {self.letters[-1]}); use fewer options, or score whole names (answers: names)"
            )
        return self.ids[:count]
