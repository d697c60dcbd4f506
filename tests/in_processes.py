"""What tests/test_processes.py starts under `accelerate launch`: each process writes what it found as a JSON file."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from icl_markup import experiment as chain
from icl_markup import warmup as warmup_module
from icl_markup.cli import main
from icl_markup.episodes import Demo, Episode, EpisodeConfig, Option, Query
from icl_markup.errors import PromptError
from icl_markup.evaluation import answer_together
from icl_markup.experiment import load_experiment, run_experiment
from icl_markup.fingerprint import Fingerprint
from icl_markup.loading import BackboneConfig
from icl_markup.lock import only_run
from icl_markup.metaicl import run_metaicl
from icl_markup.metaicl_config import MetaIclConfig
from icl_markup.model import MarkupModel
from icl_markup.processes import Processes
from icl_markup.prompted import Prompted
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.conftest import tiny_task

OPTIONS = (Option("lost card"), Option("weather"), Option("opening hours"))
EPISODES = [
    Episode(OPTIONS, (Demo("will it rain", 1), Demo("I lost my card", 0)), (Query(text, i % 3),))
    for i, text in enumerate(["is it cold", "when do you open", "my card was stolen", "sunny or not", "what time"])
]


def warmup_config(folder: Path, model: Path, **changes: Any) -> WarmupConfig:
    """A warm-up whose steps two processes can share."""
    return WarmupConfig(
        tasks=[],
        output=str(folder),
        backbone=BackboneConfig(str(model), device="cpu", precision="none", **changes),
        episodes=EpisodeConfig(n_way=(2, 3), k_shot=(0, 1)),
        optimiser=OptimiserConfig(
            steps=4, learning_rate=0.5, warmup_steps=1, batch_tokens=300, window=12, batches_per_step=2
        ),
        validation=ValidationConfig(every=2, episodes=5, n_way=2),
    )


def warmed_up(folder: Path, model: Path, **changes: Any) -> MarkupModel:
    """Warm tags up on two tasks; the validation has an odd number of episodes."""
    tasks, validation = [tiny_task("one"), tiny_task("two")], [tiny_task("validation")]
    config = warmup_config(folder, model, **changes)
    return run_warmup(config, tasks=tasks, validation_tasks=validation, progress=False).model


def failure(work: Any) -> list[str]:
    """Return the kind of error that some work ends with, and its text."""
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def primitives(here: Processes) -> dict[str, Any]:
    """Share lists of several lengths, and fail in one process alone."""

    def fail(error: Exception) -> None:
        if here.index == 1:
            raise error

    return {
        "shared": [here.share(list(range(n)), list) for n in range(6)],
        "from_main": here.from_main(lambda: [here.index, "said by the first"]),
        "ours": failure(lambda: here.together(lambda: fail(PromptError("the second prompt is too long")))),
        "defect": failure(lambda: here.together(lambda: fail(KeyError("a defect")))),
        "after": here.together(lambda: here.index),
    }


def evaluated(folder: Path, here: Processes) -> dict[str, Any]:
    """Measure with an error in one process, then with other data in one, then through the command line."""
    found: dict[str, Any] = {}
    scores, read = Prompted.scores, chain.read_task

    def fail(self: Prompted, episodes: Any) -> Any:
        if here.index == 1:
            raise PromptError("the prompt of one process is too long")
        return scores(self, episodes)

    Prompted.scores = fail  # type: ignore[method-assign]
    config = load_experiment("two.yaml", ["--cells", "failed", "--output", "failed.jsonl", "--methods", PLAIN])
    found["failed"] = failure(lambda: run_experiment(config, "c", progress=False))
    Prompted.scores = scores  # type: ignore[method-assign]
    if here.index == 1:
        chain.read_task = lambda source: tiny_task()
    found["other data"] = failure(lambda: run_experiment(config, "c", progress=False))
    chain.read_task = read
    found["code"] = main(["evaluate", "two.yaml"])
    found["joined"] = Processes.here().count
    found["left"] = sorted(path.name for path in folder.glob(".*.lock"))
    return found


PLAIN = "[{name: plain, templates: [plain_heldout_01]}]"


def split(folder: Path, name: str) -> dict[str, Any]:
    """Warm up on a backbone whose layers are split, and answer with it."""
    recompute = name == "llama"
    model = warmed_up(folder / "split" / name, folder / name, gradient_checkpointing=recompute)
    backbone = model.backbone
    held = [p.to_local() if isinstance(p, DTensor) else p for p in backbone.model.parameters()]
    layers = [p for p in backbone.model.parameters() if isinstance(p, DTensor)]
    answers = answer_together(model, EPISODES)
    names = MarkupModel(backbone, "markup", model.table.vectors(), answers="names")
    copied = MetaIclConfig(tasks=[], output=str(folder / "lora"), method="lora")
    return {
        "rows": model.table.rows.tolist(),
        "loss": answers.loss.tolist(),
        "names": [one.scores.tolist() for found in names.scores(EPISODES) for one in found],
        "fingerprint": Fingerprint.of(backbone).to_json(),
        "held": sum(p.numel() for p in held),
        "in layers": sum(p.numel() for p in layers),
        "held of layers": sum(p.to_local().numel() for p in layers),
        "all": sum(p.numel() for p in backbone.model.parameters()),
        "trained": [n for n, p in backbone.model.named_parameters() if p.requires_grad],
        "whole": not isinstance(model.table.rows, DTensor)
        and not isinstance(next(backbone.embedding.parameters()), DTensor),
        "copied": failure(lambda: run_metaicl(copied, tasks=[], validation_tasks=[], backbone=backbone)),
    }


def spoilt(folder: Path, here: Processes) -> dict[str, Any]:
    """Warm tags up where the first process finds the output locked, and where it finds the disk full."""
    found: dict[str, Any] = {}
    alone = only_run(folder / "held", PromptError, folder=True) if here.is_main else nullcontext()
    with alone:
        here.together(lambda: None)  # the others begin when it is locked
        found["locked"] = failure(lambda: warmed_up(folder / "held", folder / "bert"))
    save = warmup_module.save_checkpoint

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    warmup_module.save_checkpoint = full
    found["full"] = failure(lambda: warmed_up(folder / "full", folder / "bert"))
    warmup_module.save_checkpoint = save
    return found


def start(what: str, folder: Path, here: Processes) -> dict[str, Any]:
    """Do what is asked for; return what is to be written."""
    if what == "shared":
        return {**primitives(here), "spoilt": spoilt(folder, here), "evaluated": evaluated(folder, here)}
    found: dict[str, Any] = {name: split(folder, name) for name in ("llama", "t5", "bert", "segments")}

    def meddle(self: Any, *_args: Any) -> Any:
        with torch.no_grad():
            last = [p for p in self.model.backbone.model.parameters() if isinstance(p, DTensor)][-1]
            last.to_local().add_(1e-3)
        self.progress.step = self.config.optimiser.steps
        return {"loss": 0.0}

    step, warmup_module._Warmup._step = warmup_module._Warmup._step, meddle  # type: ignore[method-assign]
    found["meddled"] = failure(lambda: warmed_up(folder / "meddled", folder / "bert"))
    warmup_module._Warmup._step = step  # type: ignore[method-assign]
    config = load_experiment("two.yaml", ["--cells", "split-cells", "--output", "split.jsonl", "--methods", PLAIN])
    run_experiment(config, "c", progress=False)
    return found


if __name__ == "__main__":
    told, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    us = Processes.joined(on_cpu=True)
    result = start(told, place, us)
    (place / f"{told}-{us.index}.json").write_text(json.dumps(result))
