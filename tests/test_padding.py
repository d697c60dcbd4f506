"""Prompts are padded so that shapes recur, where that is faster: in a warm-up in bf16 on a CPU, and there alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icl_markup import EpisodeConfig, EpisodeSampler, MarkupModel, WarmupConfig, run_warmup
from icl_markup.blocked_attention import MULTIPLE
from icl_markup.episodes import Query
from icl_markup.errors import WarmupError
from icl_markup.stream import PromptStream
from icl_markup.warmup_config import OptimiserConfig
from tests.conftest import tiny_backbone, tiny_task
from tests.test_metaicl import PLAN, cut_short, train


def lengths_given(model: MarkupModel, *, trains: bool, text: str = "is it cold") -> tuple[int, int]:
    """Return a prompt's length, and to how many tokens the backbone was given it."""
    episode = MarkupModel.episode(["lost card", "weather"], [("will it rain", "weather")])
    episode = replace(episode, queries=(Query(text),))
    prompt = model.markup.compose(episode)
    seen: list[int] = []
    note: Any = lambda _module, given, _output: seen.append(given[0].shape[1])  # noqa: E731
    hook = model.backbone.embedding.register_forward_hook(note)
    with torch.set_grad_enabled(trains):
        model.loss_terms([prompt], [episode], True)
    hook.remove()
    return len(prompt.ids), max(seen)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "roberta"])
def test_prompts_are_padded_to_lengths_that_recur_where_that_pays(kind: str) -> None:
    def given(trains: bool = True, **options: Any) -> tuple[int, int]:
        return lengths_given(MarkupModel(tiny_backbone(kind, **options), "markup_letters"), trains=trains)

    length, padded = given(precision="bf16")
    assert length % MULTIPLE and padded == length + -length % MULTIPLE
    for length, padded in (
        given(precision="bf16", trains=False),
        given(precision="bf16", chooses_attention=False),
        given(),
    ):
        assert padded == length


def test_no_prompt_is_padded_beyond_what_the_backbone_reads() -> None:
    backbone = tiny_backbone("bert", precision="bf16", max_length=40)
    assert [backbone.padded_length(n) for n in (1, 16, 17, 32, 33, 40)] == [16, 16, 32, 32, 40, 40]
    assert [tiny_backbone("bert").padded_length(n) for n in (1, 17)] == [1, 17]


def test_batches_hold_no_more_tokens_than_they_may_with_that_padding() -> None:
    model = MarkupModel(tiny_backbone("bert", precision="bf16"))
    sampler = EpisodeSampler([tiny_task()], EpisodeConfig(n_way=(2, 4), k_shot=(0, 3)), seed=5)
    padded = model.backbone.padded_length
    stream = PromptStream(model.markup, sampler, window=32, batch_tokens=400, batches_per_step=1, padded_length=padded)
    batches = [step.batches[0] for step in itertools.islice(stream.steps(), 12)]
    sizes = [len(batch) * padded(max(len(item.prompt.ids) for item in batch)) for batch in batches]
    assert max(sizes) <= 400 and any(len(batch) > 1 for batch in batches)


def run(folder: Path, precision: str, *, resume: bool) -> None:
    plan = OptimiserConfig(steps=2, warmup_steps=0, batch_tokens=512, window=4)
    config = WarmupConfig(tasks=[], output=str(folder), optimiser=plan, resume=resume)
    backbone = tiny_backbone("bert", precision=precision)
    run_warmup(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)


def test_a_run_is_not_resumed_where_its_batches_would_be_others(tmp_path: Path) -> None:
    run(tmp_path / "run", "bf16", resume=False)
    with pytest.raises(WarmupError, match=r"multiples of 16 tokens, and here they are to multiples of 1 "):
        run(tmp_path / "run", "none", resume=True)
    run(tmp_path / "run", "bf16", resume=True)


def test_nor_is_one_of_metaicl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, steps=6)
    settings: dict[str, Any] = {"optimiser": plan, "save_every": 2}
    begun = tiny_backbone("bert", precision="bf16")
    cut_short(monkeypatch, 5, tmp_path / "run", backbone=begun, **settings)
    with pytest.raises(WarmupError, match="multiples of 16 tokens, and here they are to multiples of 1 "):
        train(tmp_path / "run", "bert", **settings)
    assert train(tmp_path / "run", backbone=begun, **settings).summary["steps"] == 6


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_names_are_padded_too(kind: str) -> None:
    model = MarkupModel(tiny_backbone(kind, precision="bf16"), answers="names")
    lengths_given(model, trains=False)  # checks what is checked at first use
    _, unpadded = lengths_given(model, trains=False, text="is it cold outside")
    _, padded = lengths_given(model, trains=True, text="is it cold outside")
    assert unpadded % MULTIPLE and padded == unpadded + -unpadded % MULTIPLE
