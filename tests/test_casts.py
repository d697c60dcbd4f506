"""Weights are cast once, to the same bits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icl_markup.batching import Batch
from icl_markup.casts import cast_once
from icl_markup.episodes import Query
from icl_markup.model import MarkupModel
from tests.conftest import tiny_backbone
from tests.test_warmup import plain_logits, warm_up


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_tags_are_the_same_to_the_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = warm_up(tmp_path / "once", backbone=tiny_backbone(kind, precision="bf16"))
    monkeypatch.setattr("icl_markup.preparation.cast_once", lambda _backbone: nullcontext(0))
    each = warm_up(tmp_path / "each", backbone=tiny_backbone(kind, precision="bf16"))
    name = "tags.safetensors"
    assert (once.folder / name).read_bytes() == (each.folder / name).read_bytes()


def test_a_weight_is_cast_once_and_its_layer_is_as_before_afterwards() -> None:
    backbone = tiny_backbone("llama", precision="bf16")
    model = MarkupModel(backbone)
    episode = MarkupModel.episode(["lost card", "weather"], [("will it rain", "weather")])
    prompt = model.markup.compose(replace(episode, queries=(Query("is it cold"),)))
    batch = Batch.of_prompts([prompt], model.pad_id)
    layer = backbone.model.model.layers[0].mlp.up_proj
    plain = plain_logits(backbone)
    before = backbone.candidate_logits(batch, model.table)
    with cast_once(backbone) as size:
        linear = [m for n, m in backbone.model.named_modules() if "layers" in n and isinstance(m, torch.nn.Linear)]
        assert size == 2 * sum(p.numel() for m in linear for p in m.parameters())
        first = backbone.candidate_logits(batch, model.table)
        kept = layer.forward.args[1]
        second = backbone.candidate_logits(batch, model.table)
        assert layer.forward.args[1] is kept and kept.dtype == torch.bfloat16
        assert torch.equal(plain_logits(backbone), plain)  # outside autocast weights are their own
    assert torch.equal(before, first) and torch.equal(first, second)
    assert "forward" not in vars(layer)


def test_without_autocast_and_for_trained_weights_nothing_is_done() -> None:
    backbone = tiny_backbone("llama")
    with cast_once(backbone):
        assert "forward" not in vars(backbone.model.model.layers[0].mlp.up_proj)
    trained = tiny_backbone("llama", precision="bf16")
    trained.model.requires_grad_(True)
    with cast_once(trained):
        assert "forward" not in vars(trained.model.model.layers[0].mlp.up_proj)
