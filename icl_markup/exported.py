"""Folders that other tools read: what lies beside their own files, and prompts for them.

``icl_markup.json`` in an exported folder names the tags, their tokens and ids, and holds the template, so that prompts
are composed for the folder by the same code as ever, and so that an adapter is imported again with its tags' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

import icl_markup
from icl_markup.answers import Answers
from icl_markup.chat import ChatFrame
from icl_markup.episodes import Episode, Query
from icl_markup.errors import ExportError, PromptError
from icl_markup.fingerprint import Fingerprint
from icl_markup.layout import Kind, Layout
from icl_markup.markup import Markup
from icl_markup.model import MarkupModel
from icl_markup.placement import Placement
from icl_markup.prompt import Prompt
from icl_markup.template import Template
from icl_markup.text import TextEncoder

FORMAT = 1
SIDECAR = "icl_markup.json"
_ANCHOR = "a"


@dataclass(frozen=True)
class Exported:
    """An exported folder: tokenizer and tags, without the model.

    Attributes:
        folder: where it is.
        tokenizer: the folder's tokenizer.
        kind: the kind of backbone.
        placement: the tags' tokens and ids.
        markup: composes prompts in the ids of the folder's vocabulary.
        chat: what stands around a prompt in a chat, or None.
        details: everything that `SIDECAR` says.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    placement: Placement
    markup: Markup
    chat: ChatFrame | None
    details: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Exported:
        """Read a folder that `export_merged` or `export_peft` wrote.

        Raises:
            ExportError: it holds no export, or its files are damaged.
        """
        folder = Path(folder)
        details = read_sidecar(folder)
        try:
            template = Template.parse(str(details["template"]["source"]), str(details["template"]["name"]))
            placement = Placement.from_json(details["tags"], int(details["first_id"]))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)
            kind, answers = details["kind"], details["answers"]
            chat = read_chat(details)
            length = int(details["max_length"])
            markup = markup_for(template, tokenizer, kind, placement, answers, length, chat)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ExportError(f"{folder / SIDECAR}: damaged: {type(error).__name__} {error}") from error
        return cls(folder, tokenizer, kind, placement, markup, chat, details)

    def prompts(self, episode: Episode, texts: Iterable[str] = ()) -> list[Prompt]:
        """Compose one prompt a query; ids are those of the folder's vocabulary.

        Args:
            episode: options, demonstrations and queries, such as `MarkupModel.episode` builds.
            texts: further queries.

        Raises:
            PromptError: as `Markup.compose` does.
        """
        queries = (*episode.queries, *map(Query, texts))
        return [self.markup.compose(replace(episode, queries=(query,))) for query in queries]

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as text which the folder's tokenizer encodes to exactly the prompt's ids.

        Special tokens that the tokenizer itself puts around a text are left out; those of a chat are written.

        Raises:
            PromptError: no text does, so the prompt has to be given as ids: texts meet inside a token of this
                tokenizer, or a user's text spells a tag or a special token.
        """
        return prompt_text(prompt, self.placement, self.markup, self.chat)


def markup_for(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    placement: Placement,
    answers: Answers,
    max_length: int,
    chat: ChatFrame | None = None,
) -> Markup:
    """Return a composer whose prompts hold the ids of an exported vocabulary."""
    encoder, layout = TextEncoder(tokenizer), Layout.of(tokenizer, kind)
    if chat:
        layout = chat.layout(tokenizer, encoder, layout)
    return Markup(template, encoder, layout, placement, answers=answers, max_length=max_length)


def prompt_text(prompt: Prompt, placement: Placement, markup: Markup, chat: ChatFrame | None) -> str:
    """Return a prompt as text; see `Exported.text`."""
    tokenizer = markup.encoder.tokenizer
    before, after = _frame(markup.layout, chat)
    inner = _inner_text(prompt, placement, markup.encoder, after)
    # A tokenizer that begins every text with a token itself must not be given the template's.
    for opening in dict.fromkeys((before, before.removeprefix(str(tokenizer.bos_token)))):
        if list(tokenizer(opening + inner)["input_ids"]) == list(prompt.ids):
            return opening + inner
    raise PromptError(
        "no text is encoded to the ids of this prompt: texts meet inside a token of the tokenizer, or one spells "
        "a tag or a special token; give the engine the prompt's token ids"
    )


def _frame(layout: Layout, chat: ChatFrame | None) -> tuple[str, str]:
    """Return what is written before and after a prompt, without spaces that are written with what they stand before."""
    if chat is None:
        return "", ""
    before = chat.before + chat.system + chat.between
    return (
        before.removesuffix(" ") if layout.space else before,
        chat.after.removesuffix(" ") if layout.answer_spaced else chat.after,
    )


def _inner_text(prompt: Prompt, placement: Placement, encoder: TextEncoder, after: str) -> str:
    """Return a prompt without its first special tokens as text; the last are `after`."""
    written = {ids: placement.text(name) for name, ids in placement.token_ids.items()}
    anchor = encoder.encode(_ANCHOR)
    parts: list[str] = []
    run: list[int] = []

    def finish_run() -> None:
        # With a letter before it, what a decoder does to the beginning of a text (dropping a space) is not done here.
        if run:
            parts.append(encoder.decode([*anchor, *run]).removeprefix(encoder.decode(anchor)))
            run.clear()

    for place, piece in enumerate(prompt.pieces):
        if piece.kind in ("tag", "special", "slot"):
            finish_run()
        if piece.kind == "tag":
            parts.append(written[piece.ids])
        elif piece.kind == "slot":
            parts.append(str(encoder.tokenizer.mask_token))
        elif piece.kind == "special":
            parts.append(after if place else "")
        else:
            run.extend(piece.ids)
    finish_run()
    return "".join(parts)


def sidecar(model: MarkupModel, placement: Placement, what: str, **more: Any) -> bytes:
    """Return the content of `SIDECAR` for an export of `model`."""
    backbone = model.backbone
    details = {
        "format": FORMAT,
        "what": what,
        "version": icl_markup.__version__,
        "kind": backbone.kind,
        "tags": placement.to_json(model.template.tags),
        "first_id": placement.first_id,
        "template": {"name": Path(model.template.name).stem, "source": model.template.source},
        "chat": model.chat and model.chat.to_json(),
        "answers": model.answers,
        "length_normalised": model.length_normalised,
        "max_length": backbone.max_length,
        "backbone": {"name": backbone.name, "revision": backbone.revision},
        "fingerprint": Fingerprint.of(backbone).to_json(),
        **more,
    }
    return (json.dumps(details, indent=1, ensure_ascii=False) + "\n").encode()


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Read `SIDECAR`.

    Raises:
        ExportError: it is missing, damaged or of a later format.
    """
    path = folder / SIDECAR
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}; is this an exported folder?") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: damaged: not valid JSON ({error})") from error
    if not isinstance(details, dict) or details.get("format") != FORMAT:
        raise ExportError(f"{path}: no export of format {FORMAT}; write it again with this version")
    return details


def read_chat(details: Mapping[str, Any]) -> ChatFrame | None:
    """Return the chat that the content of `SIDECAR` tells of.

    Raises:
        KeyError, TypeError: it is damaged.
    """
    return None if details.get("chat") is None else ChatFrame.from_json(details["chat"])


def check_target(folder: Path) -> None:
    """Check that `folder` may be written: it is new, empty, or an earlier export.

    Raises:
        ExportError: it is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SIDECAR).exists():
        raise ExportError(f"{folder}: holds other files and no export; choose an empty or a new folder")
