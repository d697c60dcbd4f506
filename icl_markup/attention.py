"""Where a slot looks: attention from it to each part of its prompt, layer by layer.

Weights are the model's own, the mean over a layer's heads: of its self-attention at the slot's position (causal and
masked models), or of its decoder's attention to the encoder from where the answer begins (sequence-to-sequence). They
say what a layer reads from, not what decides the answer (Jain & Wallace 2019, arXiv 1902.10186).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from icl_markup.batching import Batch
from icl_markup.episodes import Episode
from icl_markup.errors import BackboneError, PromptError
from icl_markup.model import MarkupModel
from icl_markup.prompt import HEAD, Piece, Prompt
from icl_markup.tags import substituted

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """A part of a prompt: its head, an option, a demonstration, the query, or its end.

    Attributes:
        kind: ``head``, ``option``, ``demonstration``, ``query`` or ``end``.
        name: what it shows, for people.
        start: where it begins, in tokens.
        stop: where it ends.
    """

    kind: str
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class SlotAttention:
    """Attention from a query's slot.

    Attributes:
        template: the template's name.
        parts: the prompt's parts, in order; together they are the whole prompt.
        kinds: the origin of each token (tag, text, value, symbol, slot or special), (tokens,).
        weights: attention from the slot to each token, the mean over heads, (layers, tokens). A layer's weights sum to
            1, save in models that keep a share for a sink.
        answer: the probability of each option.
    """

    template: str
    parts: tuple[Part, ...]
    kinds: tuple[str, ...]
    weights: Floats
    answer: dict[str, float]

    @property
    def by_part(self) -> Floats:
        """Attention to each part, (layers, parts)."""
        return np.stack([self.weights[:, part.start : part.stop].sum(1) for part in self.parts], axis=1)

    @property
    def by_kind(self) -> dict[str, Floats]:
        """Attention to all tokens of an origin, (layers,), by origin."""
        kinds = np.array(self.kinds)
        return {str(kind): self.weights[:, kinds == kind].sum(1) for kind in dict.fromkeys(self.kinds)}

    def to_json(self) -> dict[str, Any]:
        """Return the attention as JSON-able data; shares are of 1."""
        shares = self.by_part.T.tolist()
        return {
            "template": self.template,
            "tokens": len(self.kinds),
            "layers": len(self.weights),
            "answer": self.answer,
            "parts": [
                {"kind": part.kind, "name": part.name, "tokens": part.stop - part.start, "attention": share}
                for part, share in zip(self.parts, shares, strict=True)
            ],
            "kinds": {
                kind: {"tokens": self.kinds.count(kind), "attention": share.tolist()}
                for kind, share in self.by_kind.items()
            },
        }


def slot_attention(model: MarkupModel, episode: Episode) -> SlotAttention:
    """Return the attention from the slot of an episode's query.

    Args:
        model: the model; while it is asked, its attention is computed step by step (``eager``), and then as before.
        episode: options, demonstrations and one query.

    Raises:
        PromptError: there is not one query, or the prompt cannot be composed.
        BackboneError: the model does not tell its attention.
    """
    if len(episode.queries) != 1:
        raise PromptError(f"{len(episode.queries)} queries; attention is shown for one")
    prompt = model.markup.compose(episode)
    slot = prompt.slots[-1]
    # Of a slot that whole names answer there is the position alone.
    asked = replace(prompt, slots=(replace(slot, candidates=slot.candidates or (0,)),))
    batch = Batch.of_prompts([asked], model.pad_id)
    [found] = model.predictions(episode)
    return SlotAttention(
        model.template.name,
        tuple(parts_of(model, prompt, len(episode.options))),
        tuple(piece.kind for piece in prompt.pieces for _ in piece.ids),
        _weights(model, batch, slot.position),
        found.probabilities,
    )


def parts_of(model: MarkupModel, prompt: Prompt, options: int) -> Iterator[Part]:
    """Yield the parts of a prompt of one query and so many options, in order."""
    start = 0
    for place, (segment, group) in enumerate(groupby(prompt.pieces, key=lambda piece: piece.segment)):
        pieces = list(group)
        stop = start + sum(len(piece.ids) for piece in pieces)
        if segment == HEAD:
            kind = "end" if place else "head"
            yield Part(kind, kind, start, stop)
        elif segment < 0:
            yield Part("query", f"query: {_shown(model, pieces)}", start, stop)
        else:
            kind = "option" if segment <= options else "demonstration"
            yield Part(kind, _shown(model, pieces, ": " if kind == "option" else " → "), start, stop)
        start = stop


def _shown(model: MarkupModel, pieces: Sequence[Piece], between: str = " ") -> str:
    decode = model.backbone.encoder.decode
    words = [decode(list(piece.ids)).strip() for piece in pieces if piece.kind in ("value", "symbol")]
    return between.join(words)


def _weights(model: MarkupModel, batch: Batch, position: int) -> Floats:
    backbone = model.backbone
    tags = substituted(backbone.embedding, model.table) if model.table is not None else nullcontext()
    with (
        backbone.lock,  # the model's attention and its embedding are not its own meanwhile
        _eager(backbone.model),
        tags,
        backbone.autocast(),
        torch.inference_mode(),
    ):
        found = backbone.model(**backbone.inputs_of(batch), output_attentions=True)
    layers = found.cross_attentions if backbone.kind == "seq2seq" else found.attentions
    if not layers or any(layer is None for layer in layers):
        raise BackboneError(f"{type(backbone.model).__name__} does not tell the attention of all of its layers")
    rows = [layer[0].float().mean(0).cpu()[position] for layer in layers]
    return np.asarray(torch.stack(rows).double().numpy())


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """While active, a model's attention is computed step by step, so that it has weights to return.

    Raises:
        BackboneError: the model cannot change how it computes attention.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"{type(model).__name__} cannot compute attention by 'eager': {reason}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
