"""Looks inside a prompt: its pieces with their ids."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.episodes import Episode, Query
from icl_markup.model import MarkupModel
from icl_markup.prompt import Piece, Prompt
from icl_markup.tags import tags_in_vocabulary

_STYLES = {
    "tag": "bold cyan",
    "special": "magenta",
    "slot": "bold yellow",
    "symbol": "green",
    "value": "",
    "text": "dim",
}


def prompt_rows(model: MarkupModel, prompt: Prompt) -> list[tuple[str, str, str]]:
    """Return a prompt as rows of (kind, string, ids), one a piece; a tag's string is its name."""
    names = _tag_names(model)
    rows = []
    for piece in prompt.pieces:
        text = names[piece.ids[0]] if piece.kind == "tag" else " ".join(_tokens(model, piece.ids))
        rows.append((piece.kind, text, " ".join(map(str, piece.ids))))
    return rows


def prompt_pieces(model: MarkupModel, prompt: Prompt) -> list[tuple[Piece, str]]:
    """Return a prompt's pieces, each with its text as a person reads it; a tag's text is its name."""
    names = _tag_names(model)
    decode = model.backbone.encoder.decode
    return [(p, names[p.ids[0]] if p.kind == "tag" else decode(list(p.ids))) for p in prompt.pieces]


def print_prompt(model: MarkupModel, episode: Episode, text: str) -> None:
    """Print the prompt that asks about `text`.

    Raises:
        PromptError: it cannot be composed.
    """
    prompt = model.markup.compose(replace(episode, queries=(Query(text),)))
    console = Console(soft_wrap=True)
    table = Table(title=escape(f"{len(prompt.ids)} tokens for {model.backbone.name} ({model.backbone.kind})"))
    table.add_column("piece")
    table.add_column("string")
    table.add_column("ids")
    for kind, string, ids in prompt_rows(model, prompt):
        table.add_row(kind, escape(string), ids, style=_STYLES[kind])
    console.print(table)
    for slot in prompt.slots:
        what = "query" if slot.is_query else "demonstration"
        shown = " ".join(_tokens(model, slot.candidates)) or "whole names"
        console.print(f"slot of a {what}: read at position {slot.position}, candidates {escape(shown)}")
    if prompt.shortened or prompt.dropped:
        console.print(f"to fit: {prompt.shortened} demonstrations shortened, {prompt.dropped} dropped")
    for tag in tags_in_vocabulary(model.template.tags, model.backbone.tokenizer.get_vocab()):
        console.print(f"note: {tag.name} is also a token of this tokenizer; the tag is another thing and keeps apart")


def _tag_names(model: MarkupModel) -> dict[int, str]:
    """Return the tags' names by the first of their ids."""
    if model.table is None:
        return {}
    return {model.table.ids(tag.name)[0]: tag.name for tag in model.table.tags}


def _tokens(model: MarkupModel, ids: tuple[int, ...]) -> list[str]:
    return [str(token) for token in model.backbone.tokenizer.convert_ids_to_tokens(list(ids))]
