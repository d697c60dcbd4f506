"""What prompts begin with before their first tag is computed once, and answers and gradients stay what they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from icl_markup import beginnings
from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.beginnings import beginning_length, without_beginning
from icl_markup.episodes import Query
from icl_markup.model import MarkupModel
from icl_markup.prompt import Piece, Prompt
from icl_markup.tags import substituted
from tests.conftest import tiny_backbone
from tests.test_prefixes import causal

WORDS = " card bank open close rain cold lost stolen time day when where is my card bank open"


def prompts_of(model: MarkupModel, words: str) -> list[Prompt]:
    """Prompts of unlike length that begin with words in plain text."""
    demos = [("will it rain", "weather"), ("I lost my card", "lost card")]
    ids = tuple(model.backbone.encoder.encode(words))
    found = []
    for count, text in enumerate(("is it cold", "my card is gone", "where")):
        episode = MarkupModel.episode(["lost card", "weather"], demos[:count])
        prompt = model.markup.compose(replace(episode, queries=(Query(text, 0),)))
        start, *rest = prompt.pieces
        slots = tuple(replace(slot, position=slot.position + len(ids)) for slot in prompt.slots)
        found.append(replace(prompt, pieces=(start, Piece("text", ids), *rest), slots=slots))
    return found


def trained(model: MarkupModel, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Return scores, the tags' gradient, and how many ids each call of the model was given."""
    assert model.table is not None
    lengths: list[int] = []

    def note(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        lengths.append((args[0] if args else kwargs["input"]).numel())

    model.table.rows.grad = None
    hook = model.backbone.embedding.register_forward_pre_hook(note, with_kwargs=True)
    scores = model.backbone.candidate_logits(batch, model.table)
    hook.remove()
    scores.logsumexp(-1).sum().backward()
    assert model.table.rows.grad is not None
    return scores.detach(), model.table.rows.grad.clone(), lengths


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma2"])
def test_scores_and_gradients_are_the_same_and_the_beginning_is_computed_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MarkupModel(causal(name), "markup_letters")
    batch = Batch.of_prompts(prompts_of(model, WORDS), model.pad_id)
    model.backbone.candidate_logits(batch, model.table)  # checks what is checked at first use
    scores, gradient, lengths = trained(model, batch)
    beginning, rest = lengths
    rows, longest = batch.input_ids.shape
    assert beginning >= beginnings.FEWEST and rest == rows * (longest - beginning)
    monkeypatch.setattr(beginnings, "FEWEST", 10**6)
    whole_scores, whole_gradient, lengths = trained(model, batch)
    assert lengths == [rows * longest]
    torch.testing.assert_close(scores, whole_scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-3, atol=1e-6)
    assert gradient.abs().max() > 1e-4


def test_nothing_is_shared_that_a_tag_a_slot_or_padding_could_change() -> None:
    model = MarkupModel(tiny_backbone("llama"), "markup_letters")
    assert model.table is not None
    first = model.table.first_id
    prompts = prompts_of(model, WORDS)
    batch = Batch.of_prompts(prompts, model.pad_id)
    tag = min(i for i, token in enumerate(prompts[0].ids) if token >= first)
    assert beginning_length(batch, first) == tag
    assert without_beginning(batch, tag).input_ids[0, 0] >= first
    early = replace(batch, positions=batch.positions.clamp(max=20))
    assert beginning_length(early, first) == 20
    assert beginning_length(replace(batch, positions=batch.positions.clamp(max=10)), first) == 0
    other = batch.input_ids.clone()
    other[1, 18] += 1
    assert beginning_length(replace(batch, input_ids=other), first) == 18
    assert without_beginning(batch, tag).attention_mask.shape == batch.attention_mask.shape
    padded = batch.attention_mask.clone()
    padded[2, 17:] = 0
    assert beginning_length(replace(batch, attention_mask=padded), first) == 17
    short = Batch.of_prompts(prompts_of(model, " card"), model.pad_id)
    assert beginning_length(short, first) == 0


@pytest.mark.parametrize("change", ["recomputes", "trains", "both directions"])
def test_where_it_cannot_be_done_all_is_computed(change: str) -> None:
    backbone = tiny_backbone("bert" if change == "both directions" else "llama")
    model = MarkupModel(backbone, "markup_letters")
    if change == "recomputes":
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.model.train()
    elif change == "trains":
        next(backbone.model.parameters()).requires_grad_(True)
    batch = Batch.of_prompts(prompts_of(model, WORDS), model.pad_id)
    model.backbone.candidate_logits(batch, model.table)
    assert trained(model, batch)[2][0] == batch.input_ids.numel()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_neo", "bloom", "mpt", "lfm2"])
def test_padding_on_the_right_needs_no_mask_in_a_causal_model(name: str) -> None:
    model = MarkupModel(causal(name), "markup_letters")
    backbone = model.backbone
    prompts = prompts_of(model, " my card")
    batch = Batch.of_prompts(prompts, model.pad_id)
    assert not batch.attention_mask.all()
    assert "attention_mask" not in backbone.inputs_of(batch)
    assert backbone.sees_nothing_ahead
    with torch.inference_mode():
        together = backbone.candidate_logits(batch, model.table)
        masked = with_mask(backbone, batch, model)
        alone = [backbone.candidate_logits(Batch.of_prompts([p], model.pad_id), model.table) for p in prompts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, masked, rtol=1e-4, atol=1e-5)


def with_mask(backbone: Backbone, batch: Batch, model: MarkupModel) -> Tensor:
    assert model.table is not None
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with substituted(backbone.embedding, model.table):
        logits = backbone.model(**inputs).logits[batch.rows, batch.positions]
    return logits.gather(1, batch.candidates).masked_fill(~batch.candidate_mask, float("-inf"))


def test_a_model_that_looks_ahead_keeps_its_mask() -> None:
    backbone = tiny_backbone("bert")
    backbone.kind = "causal"
    assert not backbone.sees_nothing_ahead


def test_a_model_that_needs_its_mask_gets_it_whole_beside_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = causal("qwen3")
    assert backbone.exactness.limit
    backbone.__dict__["sees_nothing_ahead"] = False
    model = MarkupModel(backbone, "markup_letters")
    batch = Batch.of_prompts(prompts_of(model, WORDS), model.pad_id)
    scores, gradient, lengths = trained(model, batch)
    assert len(lengths) == 2
    monkeypatch.setattr(beginnings, "FEWEST", 10**6)
    whole_scores, whole_gradient, _ = trained(model, batch)
    torch.testing.assert_close(scores, whole_scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-3, atol=1e-6)
