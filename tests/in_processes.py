"""What tests/test_processes.py starts under `accelerate launch`: each process writes what it found as a JSON file."""

from __future__ import annotations

import copy
import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from icl_markup import experiment as chain
from icl_markup import sharded
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
from icl_markup.processes import Processes, leave
from icl_markup.prompted import Prompted
from icl_markup.sharded import shard_layers, whole
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.conftest import tiny_task

KINDS = ("llama", "t5", "bert")
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


PLAIN = "[{name: plain, templates: [plain_letters_multiple_choice]}]"


def is_split(parameter: torch.Tensor) -> bool:
    """Whether FSDP2 has split a parameter."""
    return isinstance(parameter, DTensor)


def share(parameter: Any) -> torch.Tensor:
    """Return what this process holds of a split parameter."""
    found: torch.Tensor = parameter.to_local()
    return found


def split(folder: Path, runs: Path, name: str) -> dict[str, Any]:
    """Warm up on a backbone whose layers are split, and answer with it."""
    recompute = name == "llama"
    model = warmed_up(runs / name, folder / name, gradient_checkpointing=recompute)
    backbone = model.backbone
    parameters = list(backbone.model.parameters())
    layers = [p for p in parameters if is_split(p)]
    rest = [p for p in parameters if not isinstance(p, DTensor)]
    answers = answer_together(model, EPISODES)
    names = MarkupModel(backbone, "markup_letters", model.table.vectors(), answers="names")
    copied = MetaIclConfig(tasks=[], output=str(folder / "lora"), method="lora")
    return {
        "rows": model.table.rows.tolist(),
        "loss": answers.loss.tolist(),
        "names": [one.scores.tolist() for found in names.scores(EPISODES) for one in found],
        "fingerprint": Fingerprint.of(backbone).to_json(),
        "held": sum(p.numel() for p in [*rest, *map(share, layers)]),
        "in layers": sum(whole(p).numel() for p in layers),
        "held of layers": sum(share(p).numel() for p in layers),
        "all": sum(whole(p).numel() for p in parameters),
        "trained": [n for n, p in backbone.model.named_parameters() if p.requires_grad],
        "whole": not is_split(model.table.rows) and not is_split(next(backbone.embedding.parameters())),
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
    append, warmup_module.append_line = warmup_module.append_line, full
    found["full for a line"] = failure(lambda: warmed_up(folder / "full line", folder / "bert"))
    warmup_module.append_line = append
    found["left"] = sorted(path.name for path in (folder / "full line").iterdir())
    return found


def experts(here: Processes) -> float:
    """Return how far a model whose processes choose other experts is, once it is split, from what it was.

    Returns:
        The largest difference of logits and gradients in some passes.
    """
    torch.manual_seed(0)
    size = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    sparse = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(vocab_size=50, decoder_start_token_id=0, **size, **sparse)
    models = [SwitchTransformersForConditionalGeneration(config).eval().requires_grad_(False)]
    models.append(copy.deepcopy(models[0]))
    shard_layers(models[0], torch.device("cpu"))
    differences = []
    for _ in range(3):
        drawn = torch.randn(here.count, 3, 16)[here.index : here.index + 1]
        found = []
        for model in models:
            given = drawn.clone().requires_grad_()
            logits = model(inputs_embeds=given, decoder_input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
            logits.square().mean().backward()
            found.append(torch.cat([logits.detach().flatten(), given.grad.flatten()]))
        differences.append(float((found[0] - found[1]).abs().max()))
    return max(differences)


def start(what: str, folder: Path, here: Processes) -> dict[str, Any]:
    """Do what is asked for; return what is to be written."""
    if what == "shared":
        return {**primitives(here), "spoilt": spoilt(folder, here), "evaluated": evaluated(folder, here)}
    if what == "alone":
        policies: list[str] = []
        original = sharded.fully_shard

        def noting(module: Any, **options: Any) -> Any:
            policies.append(type(options["offload_policy"]).__name__)
            return original(module, **options)

        sharded.fully_shard = noting  # type: ignore[assignment]
        return {**split(folder, folder / what, "bert"), "policies": sorted(set(policies))}
    found: dict[str, Any] = {name: split(folder, folder / what, name) for name in KINDS}

    def meddle(self: Any, *_args: Any) -> Any:
        with torch.no_grad():
            share([p for p in self.model.backbone.model.parameters() if is_split(p)][-1]).add_(1e-3)
        self.progress.step = self.config.optimiser.steps
        return {"loss": 0.0}

    step, warmup_module._Warmup._step = warmup_module._Warmup._step, meddle  # type: ignore[method-assign]
    found["meddled"] = failure(lambda: warmed_up(folder / f"meddled-{what}", folder / "bert"))
    warmup_module._Warmup._step = step  # type: ignore[method-assign]
    config = load_experiment("two.yaml", ["--cells", f"{what}-cells", "--output", f"{what}.jsonl", "--methods", PLAIN])
    run_experiment(config, "c", progress=False)
    found["experts"] = experts(here)
    return found


if __name__ == "__main__":
    told, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    us = Processes.joined(on_cpu=True)
    result = start(told, place, us)
    (place / f"{told}-{us.index}.json").write_text(json.dumps(result))
    leave()
