"""A step asks no tensor for its value, and what it came to is read after the next one was launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from icl_markup import warmup as warmup_module
from icl_markup.backbone import Backbone
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.model import MarkupModel
from icl_markup.optimisation import Launched, TagOptimiser
from icl_markup.stream import PromptStream, Step
from icl_markup.warmup_config import OptimiserConfig, ValidationConfig
from tests.conftest import tiny_backbone, tiny_task
from tests.test_warmup import warm_up

ASKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
"""What makes the CPU wait for a device."""


class Asked(TorchDispatchMode):
    """Notes every call for which a device would have to be waited for; AdamW counts its steps on the CPU."""

    def __init__(self, tags: TagOptimiser) -> None:
        super().__init__()
        self.found: list[str] = []
        self.steps = {state["step"].data_ptr() for state in tags.raw.state.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ASKS and args[0].data_ptr() not in self.steps:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def steps(model: MarkupModel, count: int) -> list[Step]:
    config = EpisodeConfig(n_way=(2, 3), k_shot=(0, 1))
    sampler = EpisodeSampler([tiny_task()], config, 0)
    stream = PromptStream(model.markup, sampler, window=8, batch_tokens=300, batches_per_step=1)
    return [step for step, _ in zip(stream.steps(), range(count), strict=False)]


def optimiser(backbone: Backbone) -> TagOptimiser:
    plan = OptimiserConfig(steps=10, warmup_steps=1)
    return TagOptimiser(MarkupModel(backbone), plan, 0.01, True, Accelerator(cpu=True))


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_a_step_asks_for_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(kind)
    tags = optimiser(backbone)
    first, *rest = steps(tags.model, 3)
    # What is decided on the CPU, of tensors that have not left it, asks no device: it is taken out here. (Padded
    # prompts of models that see all of them are the exception: there transformers looks at the mask.)
    monkeypatch.setattr(Backbone, "_needs_no_mask", lambda *_: True)
    monkeypatch.setattr("icl_markup.backbone.beginning_length", lambda *_: 0)
    monkeypatch.setattr(Backbone, "_asking_costs", lambda _: True)
    tags.launch(first)
    with Asked(tags) as asked:
        launched = [tags.launch(step) for step in rest]
    assert asked.found == []
    assert all(one.read().defect == "" for one in launched)


def test_reading_reports_what_is_not_finite() -> None:
    known = {"learning_rate": 0.1, "slots": 2, "tokens": 6, "shortened": 0, "dropped": 0, "skipped": 0}
    rows = torch.zeros(1, 1)

    def outcome(*numbers: float, scales: bool = False) -> Any:
        return Launched(torch.tensor(numbers), rows, known, 8, scales=scales).read()

    good = outcome(0.5, 1.0, 0.0, 2.0)
    assert good.defect == "" and good.metrics["accuracy"] == 0.5 and good.metrics["padding"] == 0.25
    assert not good.stop and outcome(0.5, 1, 1, 2).stop
    assert outcome(float("nan"), 1, 0, 2).defect == "loss became nan"
    assert outcome(0.5, 1, 0, float("inf")).defect == "gradient's norm became inf"
    skipped = outcome(0.5, 1, 0, float("inf"), scales=True)
    assert skipped.defect == "" and skipped.metrics["gradient_norm"] is None


def test_a_step_is_read_after_the_next_was_launched_and_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    launch, read, save = TagOptimiser.launch, Launched.read, warmup_module._Warmup._save

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            order.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(TagOptimiser, "launch", noted("launch", launch))
    monkeypatch.setattr(Launched, "read", noted("read", read))
    monkeypatch.setattr(warmup_module._Warmup, "_save", noted("save", save))
    rare = ValidationConfig(every=100, episodes=2, n_way=2)
    warm_up(tmp_path / "run", save_every=3, validation=rare)
    assert order[:7] == ["launch", "launch", "read", "launch", "read", "read", "save"]
    assert order.count("read") == order.count("launch") == 6
