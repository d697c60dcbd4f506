"""A plan is made of a configuration and a tokenizer alone, and says what the real model then costs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from icl_markup.backbone import Backbone
from icl_markup.cli import main
from icl_markup.costs import ACCELERATORS, Costs, measured
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.errors import BackboneError, ConfigError
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.plan import _drawn, observed, plan_warmup
from icl_markup.readers import TaskSource
from icl_markup.skeleton import Skeleton
from icl_markup.stream import Item, prompts_of
from icl_markup.warmup_config import OptimiserConfig, ValidationConfig, WarmupConfig
from tests.conftest import KINDS, TEXTS, tiny_backbone, tiny_task
from tests.test_activations import counted


def saved(case: str, folder: Path) -> BackboneConfig:
    """Save a tiny backbone, and return the configuration that loads it."""
    backbone = tiny_backbone(case)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return BackboneConfig(str(folder), device="cpu", precision="none", max_length=256)


def without_weights(config: BackboneConfig) -> BackboneConfig:
    """Delete the weights that a configuration names."""
    for path in Path(config.name).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BackboneError):
        Backbone.load(config)
    return config


def items_of(model: MarkupModel, config: WarmupConfig) -> tuple[Item, ...]:
    """Return the batch of the longest prompts."""
    sampler = EpisodeSampler([tiny_task()], config.episodes, 0)
    batches, _, _ = _drawn(config, model, sampler)
    return max(batches, key=lambda batch: max(item.tokens for item in batch))


@pytest.fixture
def config() -> WarmupConfig:
    """A small warm-up."""
    episodes = EpisodeConfig(n_way=(2, 3), k_shot=(0, 1))
    return WarmupConfig(tasks=[], episodes=episodes, optimiser=OptimiserConfig(steps=4, batch_tokens=400, window=16))


class Untracked(nullcontext[None]):
    """Says of every operation that no module is known for it."""

    parents = frozenset({"Global"})


def counted_by_torch(model: MarkupModel, items: tuple[Item, ...], all_slots: bool = True) -> tuple[int, int]:
    """Return FLOPs as PyTorch counts them, and the bytes that autograd saves of a real model; neither is our code."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    formulas = {aten._scaled_dot_product_flash_attention_for_cpu: attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}  # fmt: skip
    lying = [*model.backbone.model.parameters(), *model.backbone.model.buffers(), *model.table.parameters()]
    known = {tensor.untyped_storage().data_ptr() for tensor in lying}
    kept: dict[int, int] = {}
    if model.backbone.kind == "causal":  # is found out once, at first use
        assert model.backbone.exactness.limit and model.backbone.sees_nothing_ahead
    elif model.backbone.kind == "seq2seq":
        assert model.backbone.shares_names
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = Untracked()  # PyTorch's own hooks refuse a gradient that is computed in a forward pass
    with counter:
        with counted(kept):
            loss = model.loss_terms(*prompts_of(items), all_slots).loss(name_share=1.0)
        loss.backward()
    return counter.get_total_flops(), sum(size for place, size in kept.items() if place not in known)


@pytest.mark.parametrize(
    ("case", "answers"), [*((case, "symbols") for case in KINDS), ("llama", "names"), ("t5", "names")]
)
def test_a_plan_without_weights_costs_what_the_model_costs(
    case: str, answers: Any, config: WarmupConfig, tmp_path: Path
) -> None:
    named = saved(case, tmp_path / "model")
    real = MarkupModel(Backbone.load(named), answers=answers)
    config = replace(config, answers=answers)
    items = items_of(real, config)
    plan = plan_warmup(replace(config, backbone=without_weights(named)), ["h100"], tasks=[tiny_task()])
    parts = plan.parameters
    assert parts.backbone == sum(p.numel() for p in real.backbone.model.parameters())
    assert parts.embedding == sum(p.numel() for p in real.backbone.embedding.parameters())
    assert parts.embedding + parts.layers + parts.head == parts.backbone
    assert parts.tags == parts.trained == sum(p.numel() for p in real.table.parameters())

    skeleton = MarkupModel(Skeleton.build(named), answers=answers)
    fake = observed(skeleton, items, True)
    flops, kept = counted_by_torch(real, items)
    assert sum(fake.flops.values()) == flops
    ours = observed(real, items, True)
    assert fake.flops == ours.flops and fake.flops["forward"] > 0 and fake.flops["backward"] > 0
    assert fake.peak == pytest.approx(ours.peak, rel=0.05)
    assert kept <= fake.peak * 1.01 and fake.peak < 1.6 * kept


def test_memory_follows_types_casts_and_recomputing(config: WarmupConfig, tmp_path: Path) -> None:
    named = without_weights(saved("llama", tmp_path / "model"))

    def forecast(**options: Any) -> Any:
        chosen = replace(config, backbone=replace(named, **options))
        return plan_warmup(chosen, ["h100"] if "device" not in options else ["here"], tasks=[tiny_task()]).forecasts[0]

    full = forecast(dtype="fp32")
    assert full.memory.weights == pytest.approx(2 * forecast(dtype="bf16").memory.weights, rel=0.01)
    recomputed = forecast(dtype="fp32", gradient_checkpointing=True)
    assert recomputed.memory.activations < 0.8 * full.memory.activations
    assert recomputed.flops.backward > 1.4 * full.flops.backward
    quantised = forecast(quantisation="bitsandbytes-nf4")
    assert quantised.memory.weights < forecast(dtype="bf16").memory.weights
    assert quantised.quantisation == "bitsandbytes-nf4"


def test_durations_follow_steps_processes_and_accelerators(config: WarmupConfig, tmp_path: Path) -> None:
    named = without_weights(saved("bert", tmp_path / "model"))
    config = replace(config, backbone=named, validation=ValidationConfig(every=3, episodes=4, n_way=2))
    plan = plan_warmup(config, ["h100", "t4", "here"], [1, 3], tasks=[tiny_task()], validation_tasks=[tiny_task()])
    by = {(one.accelerator, one.processes): one for one in plan.durations}
    assert set(by) == {(name, count) for name in ("h100", "t4", "here") for count in (1, 3)}
    assert plan.validations == 3  # before the first step, after three, after the last
    for one in by.values():
        assert one.batches_per_step == one.processes
        total = config.optimiser.steps * one.step_seconds + plan.validations * one.validation_seconds
        assert one.total_seconds == pytest.approx(total)
        assert one.fits is (None if one.accelerator == "here" else True)
    assert by["h100", 1].step_seconds <= by["t4", 1].step_seconds
    for name in ("h100", "here"):
        # Three processes read three batches in the time of the slowest, and at most that of all three.
        assert by[name, 1].step_seconds <= by[name, 3].step_seconds <= 3.1 * by[name, 1].step_seconds


def test_this_machine_is_measured() -> None:
    here = measured(torch.device("cpu"))
    assert here.single > 1e9 and here.half > 1e8 and here.bandwidth > 1e8 and here.memory is None
    with Costs(accelerators=[here]) as costs:
        torch.ones(256, 256) @ torch.ones(256, 256)
    assert costs.flops == {"forward": 2 * 256**3, "backward": 0}
    assert costs.seconds(here, "forward") >= 2 * 256**3 / here.single
    assert costs.seconds(here, "backward") == 0


def test_what_is_freed_is_not_alive() -> None:
    weight = torch.ones(10)
    with Costs([weight]) as costs:
        first = weight * 2
        second = first + first
        del first
        view = second[:5]
        del second
    assert costs.alive == 40 and costs.peak == 80
    del view
    assert costs.alive == 0


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a warm-up's configuration, a task, and a backbone without weights."""
    without_weights(saved("llama", tmp_path / "model"))
    rows = [f"{text},{label}" for label, texts in TEXTS.items() for text in texts]
    (tmp_path / "intents.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    config = {
        "backbone": {"name": "model", "device": "cpu", "precision": "none", "max_length": 256},
        "tasks": [{"path": "intents.csv"}],
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1]},
        "optimiser": {"steps": 3, "batch_tokens": 400, "window": 16},
    }
    (tmp_path / "warmup.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


def test_the_command_prints_tables_or_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "warmup.yaml", "--accelerators", "here", "l4", "--processes", "1", "2"]
    assert main([*arguments, "--optimiser.steps", "7"]) == 0
    printed = capsys.readouterr().out
    for word in ("activations", "GFLOP", "l4", "7 steps", "not measured", "enough"):
        assert word in printed
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 3 and len(told["durations"]) == 4 and len(told["forecasts"]) == 2
    memory = told["forecasts"][0]["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert not list(workplace.glob("runs/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accelerators", "h10"], "did you mean 'h100'"),
        (["--processes", "0"], "above zero"),
        (["--optimiser.stepz", "3"], "did you mean 'steps'"),
        (["--backbone.name", "nowhere/at-all"], "nowhere/at-all"),
        (["--backbone.kind", "masked"], "masked model"),
        (["--template", "plain_letters_text_label"], "nothing to warm up"),
    ],
)
def test_errors_are_told_in_one_line(
    options: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "warmup.yaml", *options]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_accelerators_are_plausible() -> None:
    for name, one in ACCELERATORS.items():
        assert name == one.name and one.half > one.single > 0 and one.bandwidth > 0 and one.memory
    with pytest.raises(ConfigError, match="above zero"):
        plan_warmup(WarmupConfig(tasks=[TaskSource("x")]), [])
