"""Looks inside: a prompt as pieces with their ids, and what a tag folder holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.episodes import Episode, Query
from icl_markup.errors import BackboneError
from icl_markup.model import MarkupModel
from icl_markup.prompt import Piece, Prompt
from icl_markup.tagfile import load_model, read_tags
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


def print_prompt(model: MarkupModel, episode: Episode, text: str, *, chat: bool = False) -> None:
    """Print the prompt that asks about `text`.

    Raises:
        PromptError: it cannot be composed.
        BackboneError: `chat` is asked for and the tokenizer has no chat template.
    """
    if chat:
        model.markup.layout = model.markup.layout.with_chat(model.backbone.tokenizer)
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


def print_tags(folder: Path, nearest: int) -> None:
    """Print what a tag folder holds; the backbone is needed for norms of the vocabulary and nearest tokens.

    Raises:
        TagFileError: the folder is missing or damaged.
    """
    tags = read_tags(folder)
    console = Console()
    size = (folder / "tags.safetensors").stat().st_size
    parameters = sum(v.numel() for v in tags.vectors.values())
    console.print(escape(f"{folder}: {len(tags.vectors)} tags, {parameters:,} parameters, {size:,} bytes"))
    kind, form = tags.backbone["kind"], tags.backbone.get("quantisation", "none")
    described = kind if form == "none" else f"{kind}, {form}"
    console.print(escape(f"backbone: {tags.backbone['name']} ({described}), template {tags.template.name}"))
    for key, value in tags.training.items():
        console.print(escape(f"{key}: {value}"))
    table = Table()
    for heading in ("tag", "soft token", "norm"):
        table.add_column(heading)
    model = None
    try:
        model = load_model(folder)
        table.add_column("nearest tokens of the vocabulary (cosine)")
    except BackboneError as error:
        console.print(f"without its backbone, nearest tokens cannot be shown: {escape(str(error))}")
    for name, rows in tags.vectors.items():
        for index, row in enumerate(rows):
            cells = [name, str(index + 1), f"{row.norm():.3f}"]
            if model is not None:
                cells.append(", ".join(_nearest(model, row, nearest)))
            table.add_row(*map(escape, cells))
    console.print(table)
    if model is not None:
        with torch.no_grad():
            norms = model.backbone.embedding(model.backbone.vocabulary).float().norm(dim=1)
        console.print(f"norm of the vocabulary's embeddings: {norms.mean():.3f} ± {norms.std():.3f}")


@torch.no_grad()
def _nearest(model: MarkupModel, row: torch.Tensor, count: int) -> list[str]:
    ids = model.backbone.vocabulary
    table = model.backbone.embedding(ids).float()
    cosine = torch.nn.functional.cosine_similarity(table, row.to(table.device)[None], dim=1)
    best = cosine.topk(count)
    tokens = _tokens(model, tuple(ids[best.indices].tolist()))
    return [f"{token} {value:.2f}" for token, value in zip(tokens, best.values.tolist(), strict=True)]


def _tag_names(model: MarkupModel) -> dict[int, str]:
    """Return the tags' names by the first of their ids."""
    if model.table is None:
        return {}
    return {model.table.ids(tag.name)[0]: tag.name for tag in model.table.tags}


def _tokens(model: MarkupModel, ids: tuple[int, ...]) -> list[str]:
    return [str(token) for token in model.backbone.tokenizer.convert_ids_to_tokens(list(ids))]
