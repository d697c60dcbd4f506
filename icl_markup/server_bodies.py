"""What the server's requests and answers hold, with the limits that its OpenAPI page shows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TEXTS = 256
"""Texts a request."""

MOST_CHARACTERS = 100_000
"""Characters a text; of a long text the classifier reads the beginning, see its ``most_tokens``."""

MOST_LABEL_CHARACTERS = 1_000

_Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
_Label = Annotated[str, Field(min_length=1, max_length=MOST_LABEL_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClassifyBody(_Body):
    """Texts to classify: either `texts` or one `text`; with `top`, only so many labels a text are answered."""

    texts: Annotated[list[_Text], Field(min_length=1, max_length=MOST_TEXTS)] | None = None
    text: _Text | None = None
    top: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ClassifyBody:
        if (self.texts is None) == (self.text is None):
            raise ValueError('give either "text" or "texts"')
        return self

    def all(self) -> list[str]:
        """Return the texts, whichever way they were given."""
        return self.texts if self.texts is not None else [self.text or ""]


class ClassifyAnswer(BaseModel):
    """The likeliest label of a text, and each label's probability; a label that the prompt left out has 0.

    With `top`, the probabilities are the largest, the likeliest label's first.
    """

    label: str
    probabilities: dict[str, float]


class ClassifyAnswers(BaseModel):
    """One answer a text, in their order."""

    answers: list[ClassifyAnswer]


class IntentBody(_Body):
    """A label and examples of it; without `description` a label keeps the one that it has."""

    label: _Label
    examples: Annotated[list[_Text], Field(max_length=1_000)] = []
    description: Annotated[str, Field(max_length=MOST_LABEL_CHARACTERS)] | None = None


class Intent(BaseModel):
    """A label with its examples."""

    label: str
    description: str
    examples: list[str]


class IntentList(BaseModel):
    """Every label; `none_of_the_above` says how, if at all, that is answered."""

    intents: list[Intent]
    none_of_the_above: Literal["option", "threshold"] | None


class Removed(BaseModel):
    """The label that was removed."""

    removed: str


class PromptBody(_Body):
    """The text whose prompt is asked for."""

    text: _Text


class PromptPiece(BaseModel):
    """Consecutive tokens of one origin.

    `kind` is special, tag, text (of the template), value (of a user), symbol or slot; `text` is the piece as the
    model reads it, a tag's name for a tag; `tokens` counts its ids, soft tokens among them; `segment` is 0 for the
    head and the tail, 1, 2, … for options and demonstrations, and negative for the query.
    """

    kind: Literal["special", "tag", "text", "value", "symbol", "slot"]
    text: str
    tokens: int
    segment: int


class ComposedPrompt(BaseModel):
    """A composed prompt; `shortened` and `dropped` count demonstrations that did not fit whole, or at all."""

    pieces: list[PromptPiece]
    options: list[str]
    tokens: int
    slots: int
    shortened: int
    dropped: int


class Health(BaseModel):
    """The server takes requests."""

    status: Literal["ok"]
    labels: int
    backbone: str


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    detail: str
