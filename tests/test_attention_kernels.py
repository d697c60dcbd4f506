"""The implementation of attention is chosen by what a batch is for and how long it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    GlmMoeDsaForCausalLM,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from icl_markup.attention_kernels import _asks_for_sdpa, can_switch
from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.blocked_attention import BLOCKED
from icl_markup.episodes import Query
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from tests.conftest import tiny_backbone


def asked(backbone: Backbone, *, trains: bool = True) -> tuple[list[str], torch.Tensor]:
    """Return by which implementation a batch was computed, and the tags' gradient or the scores."""
    model = MarkupModel(backbone)
    assert model.table is not None
    episode = MarkupModel.episode(["lost card", "weather"], [("will it rain", "weather")])
    prompt = model.markup.compose(replace(episode, queries=(Query("is it cold"),)))
    batch = Batch.of_prompts([prompt], model.pad_id)
    seen: list[str] = []
    note: Any = lambda *_: seen.append(backbone.model.config._attn_implementation)  # noqa: E731
    hook = backbone.embedding.register_forward_hook(note)
    with torch.set_grad_enabled(trains):
        scores = backbone.candidate_logits(batch, model.table)
    hook.remove()
    if not trains:
        return seen[-1:], scores
    scores.logsumexp(-1).sum().backward()
    assert model.table.rows.grad is not None
    return seen[-1:], model.table.rows.grad


@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "roberta"])
def test_prompts_train_in_blocks_in_bf16_and_all_else_is_as_it_was(kind: str) -> None:
    backbone = tiny_backbone(kind, precision="bf16")
    assert can_switch(backbone.model)
    used, gradient = asked(backbone)
    assert used == [BLOCKED] and backbone.model.config._attn_implementation == "sdpa"
    assert asked(backbone, trains=False)[0] == ["sdpa"]
    fixed = tiny_backbone(kind, precision="bf16", chooses_attention=False)
    used, other = asked(fixed)
    assert used == ["sdpa"]
    torch.testing.assert_close(gradient, other, rtol=0.1, atol=0.05 * float(other.abs().max()))
    assert asked(tiny_backbone(kind))[0] == ["sdpa"]


def test_a_configuration_that_names_an_implementation_has_it(tmp_path: Any) -> None:
    tiny = tiny_backbone("bert")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    config = BackboneConfig(str(tmp_path), device="cpu", precision="bf16")
    assert Backbone.load(config).chooses_attention
    named = Backbone.load(replace(config, attention="sdpa"))
    assert not named.chooses_attention and asked(named)[0] == ["sdpa"]
    assert Backbone.load(replace(config, attention="eager")).model.config._attn_implementation == "eager"


def test_models_that_do_something_else_under_another_name_keep_theirs() -> None:
    kinds = (BertForMaskedLM, LlamaForCausalLM, Qwen3ForCausalLM, RobertaForMaskedLM, T5ForConditionalGeneration)
    assert not any(_asks_for_sdpa(kind.__module__) for kind in kinds)
    assert _asks_for_sdpa(GlmMoeDsaForCausalLM.__module__)  # picks keys in its mask for sdpa, and only then
    assert _asks_for_sdpa("a_module_that_nobody_imported")
