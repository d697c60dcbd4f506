"""Warm-ups on real shapes: a pretrained Llama of 260k parameters, and a Flan-T5-small with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.embedded import sample_folders
from icl_markup.episodes import EpisodeConfig
from icl_markup.model import MarkupModel
from icl_markup.readers import TaskSource
from icl_markup.warmup import OptimiserConfig, WarmupConfig, run_warmup
from tests.conftest import shared_path


@pytest.mark.parametrize(("kind", "rate", "tokens"), [("causal", 0.05, 3000), ("seq2seq", 0.2, 900)])
def test_training_loss_falls_on_real_shapes(kind: str, rate: float, tokens: int, tmp_path: Path) -> None:
    if kind == "causal":
        name = str(shared_path("models", "karpathy-stories260K"))
    else:
        source = shared_path("models", "flan-t5-tokenizer")
        transformers.set_seed(0)
        settings = transformers.AutoConfig.from_pretrained(source)
        settings.num_layers = settings.num_decoder_layers = 2  # the true widths, fewer layers: seconds, not minutes
        transformers.T5ForConditionalGeneration(settings).save_pretrained(tmp_path / "model")
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "model")
        name = str(tmp_path / "model")
    backbone = Backbone.load(BackboneConfig(name, device="cpu", precision="none"))
    assert backbone.kind == kind
    checksum = backbone.checksum()
    config = WarmupConfig(
        tasks=[TaskSource(str(sample_folders("warmup")[0]))],
        output=str(tmp_path / "run"),
        answers="symbols",
        episodes=EpisodeConfig(n_way=(2, 2), k_shot=(0, 0)),
        optimiser=OptimiserConfig(steps=30, learning_rate=rate, batch_tokens=tokens, window=32),
    )
    result = run_warmup(config, backbone=backbone, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])
    assert backbone.checksum() == checksum
    loaded = MarkupModel.from_tags(result.folder, backbone)
    assert loaded.classify(["hello"], ["a", "b"]) == result.model.classify(["hello"], ["a", "b"])
