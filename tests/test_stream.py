"""The stream of training batches: the same with and without workers, from any position on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from icl_markup import EpisodeConfig, EpisodeSampler, MarkupError, MarkupModel, WarmupConfig, run_warmup
from icl_markup.stream import Position, PromptStream
from icl_markup.warmup_config import OptimiserConfig
from tests.conftest import tiny_backbone, tiny_task


def stream(workers: int, *, max_length: int | None = None) -> PromptStream:
    markup = MarkupModel(tiny_backbone("bert", max_length=max_length)).markup
    sampler = EpisodeSampler([tiny_task()], EpisodeConfig(n_way=(2, 3), k_shot=(0, 2), queries=(1, 3)), seed=5)
    return PromptStream(markup, sampler, window=6, batch_tokens=200, batches_per_step=2, workers=workers)


@pytest.mark.parametrize("start", [Position(), Position(2, 1)])
def test_workers_change_nothing(start: Position) -> None:
    alone = list(itertools.islice(stream(0).steps(start), 9))
    state = torch.get_rng_state()
    ahead = list(itertools.islice(stream(2).steps(start), 9))
    assert alone == ahead
    assert torch.equal(state, torch.get_rng_state())
    assert alone[-1].after.window > start.window + 1


def test_a_worker_says_what_is_wrong() -> None:
    with pytest.raises(MarkupError, match="no prompt of a whole window of 6 episodes") as found:
        next(stream(1, max_length=4).steps())
    assert "Traceback" not in str(found.value)


def test_a_warm_up_makes_the_same_tags_with_workers(tmp_path: Path) -> None:
    found = []
    for workers in (0, 1):
        config = WarmupConfig(
            tasks=[], output=str(tmp_path / str(workers)), workers=workers,
            episodes=EpisodeConfig(n_way=(2, 3), k_shot=(0, 1)),
            optimiser=OptimiserConfig(steps=3, window=4, batch_tokens=200),
        )  # fmt: skip
        model = run_warmup(config, tasks=[tiny_task()], backbone=tiny_backbone("bert"), progress=False).model
        found.append(model.table.rows.detach().clone())
    assert torch.equal(*found)
