"""Warm-up: only tags move, equal runs give equal bytes, an interrupted run ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icl_markup import warmup as warmup_module
from icl_markup.backbone import Backbone
from icl_markup.episodes import Demo, Episode, EpisodeConfig, Option, Query
from icl_markup.errors import ConfigError, WarmupError
from icl_markup.model import MarkupModel
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.conftest import tiny_backbone, tiny_task

LAUNCH = Path(__file__).resolve().parents[1] / "configs" / "accelerate" / "multi_gpu.yaml"


def config_for(folder: Path, **changes: Any) -> WarmupConfig:
    base = WarmupConfig(
        tasks=[],
        output=str(folder),
        episodes=EpisodeConfig(n_way=(2, 3), k_shot=(0, 1), none_option=0.3, out_of_scope=0.5),
        optimiser=OptimiserConfig(steps=6, learning_rate=0.5, warmup_steps=1, batch_tokens=600, window=8),
        validation=ValidationConfig(every=2, episodes=4, n_way=2),
        save_every=2,
    )
    return replace(base, **changes)


def warm_up(folder: Path, kind: str = "bert", backbone: Backbone | None = None, **changes: Any) -> Any:
    tasks = [tiny_task("one"), tiny_task("two")]
    return run_warmup(
        config_for(folder, **changes),
        tasks=tasks,
        validation_tasks=[tiny_task("validation")],
        backbone=backbone or tiny_backbone(kind),
        progress=False,
    )


def plain_logits(backbone: Backbone) -> torch.Tensor:
    """The model's own logits, through its own head, on a text without any tag."""
    ids = torch.tensor(
        [[*backbone.layout.prefix, *backbone.encoder.encode(" when do you open"), *backbone.layout.suffix]]
    )
    inputs = {"input_ids": ids}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 5]])
    with torch.no_grad():
        return backbone.model(**inputs).logits


def test_logits_without_tags_are_bit_equal_before_during_and_after(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plain_logits(backbone)
    weights = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    during = []
    step = warmup_module._Warmup._step

    def spy(self: Any, *args: Any) -> Any:
        result = step(self, *args)
        during.append(plain_logits(backbone))
        return result

    monkeypatch.setattr(warmup_module._Warmup, "_step", spy)
    result = run_warmup(
        config_for(tmp_path / "run"), tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False
    )
    assert len(during) == 6
    assert all(torch.equal(before, logits) for logits in during)
    assert torch.equal(before, plain_logits(backbone))
    assert all(torch.equal(weights[k], v) for k, v in backbone.model.state_dict().items())
    assert not torch.equal(result.model.table.rows, MarkupModel(backbone).table.rows)


def test_tags_move_and_nothing_else_requires_a_gradient(backbone: Backbone, tmp_path: Path) -> None:
    untrained = MarkupModel(backbone).table
    result = warm_up(tmp_path / "run", backbone=backbone, validation=ValidationConfig(every=100, episodes=2, n_way=2))
    last = warmup_module.load_checkpoint(tmp_path / "run", torch.optim.AdamW([torch.nn.Parameter(untrained.rows * 0)]))[
        0
    ]
    assert not torch.equal(untrained.rows.detach(), last)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert [name for name, p in result.model.table.named_parameters() if p.requires_grad] == ["rows"]


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_two_equal_runs_give_equal_bytes(kind: str, tmp_path: Path) -> None:
    first = warm_up(tmp_path / "a" / "run", kind)
    second = warm_up(tmp_path / "b" / "run", kind)
    for name in ("tags.safetensors", "tags.json", "README.md"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    metrics = [(tmp_path / x / "run" / "metrics.jsonl").read_bytes() for x in "ab"]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(("kind", "stop", "batches"), [("llama", 4, 1), ("t5", 5, 1), ("bert", 1, 1), ("bert", 4, 2)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    kind: str, stop: int, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = OptimiserConfig(
        steps=6, learning_rate=0.5, warmup_steps=1, batch_tokens=400, window=8, batches_per_step=batches
    )
    whole = warm_up(tmp_path / "whole", kind, optimiser=plan)
    step = warmup_module._Warmup._step

    def interrupt(self: Any, *args: Any) -> Any:
        if self.progress.step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)  # arrives in the middle of a step, which is finished first
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(warmup_module._Warmup, "_step", interrupt)
        with pytest.raises(WarmupError, match="--resume"):
            warm_up(tmp_path / "cut", kind, optimiser=plan)
    resumed = warm_up(tmp_path / "cut", kind, resume=True, optimiser=plan)
    assert (resumed.folder / "tags.safetensors").read_bytes() == (whole.folder / "tags.safetensors").read_bytes()
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "cut/checkpoint.safetensors").read_bytes() == (
        tmp_path / "whole/checkpoint.safetensors"
    ).read_bytes()


def test_a_run_killed_between_checkpoints_continues_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = warm_up(tmp_path / "whole")
    step = warmup_module._Warmup._step

    def die(self: Any, *args: Any) -> Any:
        if self.progress.step == 5:
            raise SystemExit  # nothing is saved on the way out
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(warmup_module._Warmup, "_step", die)
        with pytest.raises(SystemExit):
            warm_up(tmp_path / "cut")
    resumed = warm_up(tmp_path / "cut", resume=True)
    assert (resumed.folder / "tags.safetensors").read_bytes() == (whole.folder / "tags.safetensors").read_bytes()
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_an_output_with_a_run_is_not_overwritten_nor_resumed_with_another_configuration(tmp_path: Path) -> None:
    warm_up(tmp_path / "run")
    with pytest.raises(WarmupError, match="holds a run already"):
        warm_up(tmp_path / "run")
    with pytest.raises(WarmupError, match="another seed"):
        warm_up(tmp_path / "run", resume=True, seed=7)


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    warm_up(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WarmupError, match="damaged checkpoint"):
        warm_up(tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = MarkupModel.loss_terms
    calls = {"n": 0}

    def poisoned(self: MarkupModel, *args: Any, **kwargs: Any) -> Any:
        result = terms(self, *args, **kwargs)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            calls["n"] += 1
            if calls["n"] == 4:
                return replace(result, scores=result.scores * float("nan"))
        return result

    monkeypatch.setattr(MarkupModel, "loss_terms", poisoned)
    with pytest.raises(WarmupError, match="loss became nan"):
        warm_up(tmp_path / "run")
    kept = MarkupModel.from_tags(tmp_path / "run" / "tags", tiny_backbone("bert"))
    assert torch.isfinite(kept.table.rows).all()


def test_a_changed_backbone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    step = warmup_module._Warmup._step

    def meddle(self: Any, *args: Any) -> Any:
        with torch.no_grad():
            next(backbone.model.parameters())[0, 0] += 1e-7
        return step(self, *args)

    monkeypatch.setattr(warmup_module._Warmup, "_step", meddle)
    with pytest.raises(WarmupError, match="weights changed"):
        warm_up(tmp_path / "run", backbone=backbone)
    assert not (tmp_path / "run" / "tags").exists()


def test_early_stop_after_validations_without_improvement(tmp_path: Path) -> None:
    plan = OptimiserConfig(steps=40, learning_rate=1e-6, batch_tokens=600, window=8)
    patience = ValidationConfig(every=1, episodes=4, n_way=2, patience=3)
    result = warm_up(tmp_path / "run", optimiser=plan, validation=patience)
    assert result.summary["steps"] < 40
    assert result.summary["best step"] < result.summary["steps"]


def test_supervising_all_slots_trains_on_more_slots_than_the_query_alone(tmp_path: Path) -> None:
    shots = EpisodeConfig(n_way=(2, 3), k_shot=(1, 1))
    counts = {}
    for supervise in ("all", "query"):
        warm_up(tmp_path / supervise, "llama", answers="symbols", supervise=supervise, episodes=shots)
        rows = [json.loads(line) for line in (tmp_path / supervise / "metrics.jsonl").read_text().splitlines()]
        counts[supervise] = [row["slots"] for row in rows if "slots" in row]
    assert all(a > q for a, q in zip(counts["all"], counts["query"], strict=True))


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_whole_names_can_be_warmed_up_and_scored(kind: str, tmp_path: Path) -> None:
    result = warm_up(tmp_path / "run", kind, answers="names")
    loaded = MarkupModel.from_tags(result.folder, tiny_backbone(kind))
    assert loaded.answers == "names"
    labels = [f"{a}{b}" for a in "abcdef" for b in "vwxyz"]  # more than there are symbols
    for model in (loaded, MarkupModel(tiny_backbone(kind), "markup_letters")):
        [answer] = model.classify(["when"], labels)
        assert list(answer.probabilities) == labels
        assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_little_is_padded_and_the_summary_says_how_much(tmp_path: Path) -> None:
    plan = OptimiserConfig(steps=12, batch_tokens=900, window=96)
    result = warm_up(tmp_path / "run", optimiser=plan)
    assert 0 <= result.summary["padding"] < 0.10


def test_two_processes_give_the_tags_of_one(tmp_path: Path) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": e.text, "label": e.label}) for e in tiny_task().split("train")]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    config = {
        "tasks": [{"path": str(tmp_path / "task.jsonl")}],
        "backbone": {"name": str(tmp_path / "model"), "device": "cpu", "precision": "none"},
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1]},
        "optimiser": {"steps": 4, "batch_tokens": 300, "window": 12, "batches_per_step": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    rows = []
    for processes in (1, 2):
        # With --cpu accelerate would start one process, however many it is asked for.
        launch = ["accelerate.commands.launch", "--config_file", str(LAUNCH), "--num_processes", str(processes)]
        command = ["-m", "icl_markup.cli", "warmup", str(tmp_path / "config.yaml")]
        done = subprocess.run(
            [sys.executable, "-m", *launch, *command, "--output", str(tmp_path / f"run{processes}")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        rows.append(MarkupModel.from_tags(tmp_path / f"run{processes}" / "tags").table.rows.detach())
        assert done.stdout.count("tags: ") == 1
    assert torch.allclose(rows[0], rows[1], atol=1e-5)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Any, *_args: Any) -> float:
        return float("inf")

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", poisoned)
    with pytest.raises(WarmupError, match="gradient's norm became inf"):
        warm_up(tmp_path / "run")


@pytest.mark.parametrize("name", ["steps", "batches_per_step", "window", "batch_tokens"])
def test_a_plan_that_would_never_end_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: 0 is not above zero"):
        OptimiserConfig(**{name: 0})


def test_gradient_accumulation_gives_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    model = MarkupModel(tiny_backbone("bert"), "markup_letters")
    options = (Option("lost card"), Option("weather"))
    episodes = [Episode(options, (Demo("rain", 1),), (Query(text, i % 2),)) for i, text in enumerate("abcdef")]
    prompts = [model.markup.compose(episode) for episode in episodes]

    def gradient(parts: list[slice]) -> torch.Tensor:
        model.table.rows.grad = None
        for part in parts:
            terms = model.loss_terms(prompts[part], episodes[part], True)
            loss = torch.nn.functional.cross_entropy(terms.scores, terms.targets, reduction="sum") / len(prompts)
            loss.backward()
        return model.table.rows.grad.clone()

    whole = gradient([slice(0, 6)])
    assert torch.allclose(whole, gradient([slice(0, 2), slice(2, 5), slice(5, 6)]), atol=1e-6)
    assert whole.abs().sum() > 0
