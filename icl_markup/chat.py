"""Chat models: the prompt as the message of a user in the model's chat template, and the slot after its start.

A template is rendered once, with marks in the place of messages, and cut at them. Only what stands around the marks
comes from the template, and only that may hold special tokens: messages never pass through Jinja, and are encoded by
themselves. (Where a template marks turns in ordinary text, as Llama 2's ``[/INST]``, a message that spells the mark out
reads like it: there is no token to be kept out.) The slot stands where the assistant's answer begins: after the
generation prompt and, where a template writes more before an answer (a space, the name of a channel), after that.

Where a template has no system role (Llama 2 and Gemma 3 have one of their own making, Gemma 1 and 2 none), the system
message begins the user's turn, with a blank line after it. Templates that reason first (Qwen3) are told not to. The
date that some templates write is always 26 July 2024, which Llama 3.2's takes where it knows none: prompts that change
from day to day would be others than those that tags were warmed up in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from icl_markup.errors import BackboneError, ConfigError
from icl_markup.layout import Layout
from icl_markup.text import TextEncoder, is_encodable

_SYSTEM, _USER, _ASSISTANT = "systemmessagemark", "usermessagemark", "assistantmessagemark"
_MARKS = ("Zq", "message", "0")
"""What stands for a message where a template's text is encoded; the next, where one melts into its surroundings."""

_NO_REASONING = {"enable_thinking": False, "thinking": False}
"""Variables by which templates are told not to reason (Qwen3, SmolLM3, GLM; DeepSeek V3.1, Granite)."""

_DATE = {"%d": "26", "%m": "07", "%Y": "2024", "%y": "24", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
_TODAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in {**_DATE, "%H": "00", "%M": "00", "%S": "00"}.items())
    + " }}{%- endmacro -%}"
)
_REASONS = re.compile(r"<(think|thinking|reason|reasoning|thought)>\s*$")


@dataclass(frozen=True)
class ChatConfig:
    """Whether prompts stand in the model's chat template, and what is written around them."""

    enabled: bool = False
    """Put every prompt into the chat template of the backbone's tokenizer, as the message of a user."""

    system: str = ""
    """A system message before it; where the template has no such role, the user's turn begins with it."""

    template: str | None = None
    """A Jinja file, or the name of one of several templates of the tokenizer; null: the tokenizer's (default) one."""

    options: dict[str, Any] = field(default_factory=dict)
    """Variables of the template, such as {date_string: 1 Jan 2025}; reasoning is switched off unless one says so."""

    def __post_init__(self) -> None:
        if not self.enabled and (self.system or self.template or self.options):
            raise ConfigError("chat: something is set, but chat.enabled is not; set it to true (on a command: --chat)")
        if not is_encodable(self.system):
            raise ConfigError("chat.system holds half of a surrogate pair, which is no text; remove it")


NO_CHAT: dict[str, Any] = asdict(ChatConfig())
"""What configurations that were written before there were chats lack."""


@dataclass(frozen=True)
class ChatFrame:
    """What stands around a prompt in a chat, as text.

    Attributes:
        before: the template's text up to the system message, or up to the prompt where there is none.
        system: the system message; it is text and holds no special token, whatever it looks like.
        between: the template's text from there to the prompt.
        after: the template's text from the prompt to the answer; a space at its end is the answer's.
        trims: whether the template takes white space off both ends of a message.
    """

    before: str
    system: str
    between: str
    after: str
    trims: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: ChatConfig) -> ChatFrame:
        """Render a tokenizer's chat template.

        Raises:
            BackboneError: the tokenizer has no chat template, it cannot be rendered, it does not show the messages
                once each and in order, or it begins to reason before it answers.
        """
        template, where = _template(tokenizer, config)
        render = _Renderer(tokenizer, template, config, where)
        user = {"role": "user", "content": _USER}
        asked = [user]
        rendered = render(asked, generate=True)
        if rendered.count(_USER) != 1:
            raise BackboneError(f"{where} shows the user's message {rendered.count(_USER)} times instead of once")
        trims = render([{**user, "content": f"\n{_USER}\n"}], generate=True) == rendered
        before, between, after = rendered.partition(_USER)[0], "", rendered.partition(_USER)[2]
        system = config.system.strip()
        if system:
            with_role = [{"role": "system", "content": _SYSTEM}, user]
            parts = re.split(f"{_SYSTEM}|{_USER}", render.tried(with_role))
            if len(parts) == 3 and render.tried(with_role).index(_SYSTEM) == len(parts[0]):
                asked, (before, between, after) = with_role, parts
            else:
                between = "\n\n"
        after += render.before_answer(asked, render(asked, generate=True))
        if _REASONS.search(after):
            raise BackboneError(
                f"{where} opens a block of reasoning before the answer, where the slot would stand; switch that off "
                "by the template's own variable (chat.options), or give a template without it (chat.template)"
            )
        return cls(before, system, between, after, trims)

    def layout(self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, plain: Layout) -> Layout:
        """Return what a backbone puts around a prompt in this chat.

        Args:
            tokenizer: the backbone's.
            encoder: the same as a `TextEncoder`.
            plain: the layout without a chat. Its special tokens are left out: a template writes its own.

        Raises:
            BackboneError: the backbone is a masked one.
        """
        if plain.kind == "masked":
            raise BackboneError("a masked backbone has no chat, as nothing is generated; leave chat away")
        # An empty text after the answer: the tokenizer itself tells whether that begins with a space.
        texts = [self.before, *([self.between] if self.system else []), self.after, ""]
        ids, spaces = _template_ids(tokenizer, encoder, texts)
        prefix = ids[0]
        if self.system:
            prefix += tuple(encoder.encode(f" {self.system}" if spaces[0] else self.system)) + ids[1]
        suffix = ids[-2]
        if plain.kind == "seq2seq" and suffix[-len(plain.suffix) :] != plain.suffix:
            suffix += plain.suffix  # the encoder's end of sequence is no part of a chat
        return replace(
            plain,
            prefix=prefix,
            suffix=suffix,
            space=spaces[-2],
            trims=self.trims,
            answer_spaced=spaces[-1] if plain.kind == "causal" else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the frame as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ChatFrame:
        """Read what `to_json` returned.

        Raises:
            TypeError, KeyError, ValueError: the data is not a frame.
        """
        texts = {name: data[name] for name in ("before", "system", "between", "after")}
        if not all(isinstance(text, str) for text in texts.values()) or not isinstance(data["trims"], bool):
            raise TypeError("chat is not four texts and a truth value")
        return cls(**texts, trims=data["trims"])


def _template(tokenizer: PreTrainedTokenizerBase, config: ChatConfig) -> tuple[str, str]:
    """Return a template's source, and what it is called in messages."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if config.template is not None and config.template not in named:
        try:
            return Path(config.template).read_text(encoding="utf-8"), f"the chat template {config.template}"
        except (OSError, UnicodeDecodeError) as error:
            known = f" nor one of {', '.join(sorted(named))}" if named else ""
            raise BackboneError(f"chat template {config.template!r}: no file that can be read{known}") from error
    name = repr(tokenizer.name_or_path or type(tokenizer).__name__)
    if tokenizer.chat_template is None:
        raise BackboneError(
            f"the tokenizer of {name} has no chat template; leave chat away, or name a Jinja file as chat.template"
        )
    try:
        return tokenizer.get_chat_template(config.template), f"the chat template of {name}"
    except ValueError as error:
        raise BackboneError(f"the tokenizer of {name} has several chat templates; chat.template names one") from error


class _Renderer:
    """Renders messages with one template, without tokenizing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, config: ChatConfig, where: str):
        self.tokenizer = tokenizer
        self.template = _TODAY + template
        self.options = {**_NO_REASONING, **config.options}
        self.where = where

    def __call__(self, messages: Sequence[dict[str, str]], *, generate: bool) -> str:
        """Render messages; templates of models that also see pictures may take a message in parts alone."""
        rendered = self._rendered(messages, generate)
        if _USER in rendered:
            return rendered
        parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        return self._rendered(parts, generate)

    def _rendered(self, messages: Sequence[dict[str, Any]], generate: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.template,
                    add_generation_prompt=generate,
                    tokenize=False,
                    **self.options,
                )
            )
        except (jinja2.TemplateError, ImportError, ValueError, TypeError, LookupError, AttributeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackboneError(f"{self.where} cannot be rendered: {first}") from error

    def tried(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages rendered, or nothing where the template refuses one of their roles."""
        try:
            return self(messages, generate=True)
        except BackboneError:
            return ""

    def before_answer(self, messages: Sequence[dict[str, str]], asked: str) -> str:
        """Return what the template writes between `asked`, messages with its generation prompt, and an answer."""
        try:
            answered = self([*messages, {"role": "assistant", "content": _ASSISTANT}], generate=False)
        except BackboneError:
            return ""
        head, found, _ = answered.partition(_ASSISTANT)
        return head[len(asked) :] if found and head.startswith(asked) else ""


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, texts: Sequence[str]
) -> tuple[list[tuple[int, ...]], list[bool]]:
    """Encode a template's texts as they stand around messages, special tokens among them.

    Returns:
        The ids of each text, and for each but the last whether a space stands before the message that follows.
    """
    for mark in _MARKS:
        ids = _ids(tokenizer, mark.join(texts))
        forms = [(encoder.encode(f" {mark}"), True), (encoder.encode(mark), False)]
        found, spaces, start = [], [], 0
        for _ in texts[1:]:
            places = [(i, form, space) for form, space in forms if (i := _find(ids, form, start)) is not None]
            if not places:
                break
            # The form with a space may end as the one without it: then it is the longer one that begins first.
            place, form, space = min(places, key=lambda one: (one[0], -len(one[1])))
            found.append(tuple(ids[start:place]))
            spaces.append(space and form != forms[1][0])
            start = place + len(form)
        else:
            if all(_find(ids, form, start) is None for form, _ in forms):
                return [*found, tuple(ids[start:])], spaces
    spaces = [text.endswith(" ") for text in texts[:-1]]
    bare = [text.removesuffix(" ") if space else text for text, space in zip(texts, [*spaces, False], strict=True)]
    return [tuple(_ids(tokenizer, text)) for text in bare], spaces


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int | None:
    places = range(start, len(ids) - len(part) + 1)
    return next((i for i in places if list(ids[i : i + len(part)]) == list(part)), None)
