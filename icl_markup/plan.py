"""A warm-up's plan: parameters, memory, FLOPs and time, found before it runs and without any weights.

The warm-up's own batches are composed, and its own forward and backward pass run on a model of fake tensors
(`icl_markup.skeleton`), which a `icl_markup.ledger.Ledger` watches. So nothing here knows an architecture, and whatever
transformers builds can be planned.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from icl_markup.accelerators import CONTEXT_GIB, REDUCTION_SECONDS, Accelerator, accelerator
from icl_markup.episodes import EpisodeSampler
from icl_markup.errors import ConfigError
from icl_markup.loading import device_of
from icl_markup.model import MarkupModel
from icl_markup.readers import read_task
from icl_markup.skeleton import Skeleton, Target
from icl_markup.start import Start
from icl_markup.study import Forecast, Study
from icl_markup.tasks import Task
from icl_markup.warmup import for_tasks
from icl_markup.warmup_config import WarmupConfig
from icl_markup.workload import Curve, Workload

HERE = "here"
"""The name of this machine among accelerators."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers there are. What is tied counts once, with the embedding."""

    backbone: int
    embedding: int
    layers: int
    head: int
    tags: int
    trained: int


@dataclass(frozen=True)
class Batches:
    """What batches are like: means, and the longest prompt in tokens."""

    prompts: float
    tokens: float
    padding: float
    longest: int
    batches_seen: int


@dataclass(frozen=True)
class Duration:
    """The time of a run.

    Attributes:
        accelerator: its name.
        processes: how many of them, an accelerator each.
        batches_per_step: as configured, or the next multiple of the processes.
        step_seconds: of a step: its batches on the busiest process, composing where nothing overlaps it, and the sum
            of gradients.
        validation_seconds: of one validation.
        total_seconds: all steps and validations.
        tokens_per_second: padding left out.
        fits: whether the memory is enough; None where that is not known.
    """

    accelerator: str
    processes: int
    batches_per_step: int
    step_seconds: float
    validation_seconds: float
    total_seconds: float
    tokens_per_second: float
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """What is known of a warm-up before it runs."""

    backbone: str
    kind: str
    parameters: Parameters
    steps: int
    validations: int
    batches: Batches
    compose_seconds: float
    forecasts: tuple[Forecast, ...]
    durations: tuple[Duration, ...]


def plan_warmup(
    config: WarmupConfig,
    accelerators: Sequence[str] = (HERE,),
    processes: Sequence[int] = (1,),
    *,
    tasks: Sequence[Task] | None = None,
    validation_tasks: Sequence[Task] | None = None,
) -> Plan:
    """Plan a warm-up.

    Args:
        config: the warm-up; of its backbone, configuration and tokenizer are read.
        accelerators: names of `icl_markup.accelerators.ACCELERATORS`, or ``here``: this machine, on which operations
            are timed.
        processes: numbers of processes.
        tasks: tasks already read, instead of `config.tasks`.
        validation_tasks: the same for `config.validation_tasks`.

    Raises:
        ConfigError: an accelerator is not known, or a number of processes is not positive.
        BackboneError: the model cannot be built from its configuration, or not be run without numbers.
        MarkupError: what a warm-up would not begin with either.
    """
    known = [None if name == HERE else accelerator(name) for name in accelerators]
    if not known or not processes or min(processes) < 1:
        raise ConfigError("a plan is for one accelerator or more, and for numbers of processes above zero")
    tasks = list(tasks if tasks is not None else [read_task(source) for source in config.tasks])
    if config.most_tasks is not None:
        tasks = random.Random(config.seed).sample(tasks, min(config.most_tasks, len(tasks)))
    if validation_tasks is None:
        validation_tasks = [read_task(source) for source in config.validation_tasks]
    sampler = EpisodeSampler(tasks, for_tasks(config.episodes, tasks, config.most_tasks), config.seed)
    here = device_of(config.backbone.device)
    targets = list(dict.fromkeys([_target(one, here) for one in known]))
    models = {target: _model(config, target) for target in targets}
    first = models[targets[0]]
    most = max(_per_step(config, count) for count in processes)
    work = Workload.draw(config, first, sampler, validation_tasks, most)
    studies = {target: Study(target, model, config.supervise == "all", work) for target, model in models.items()}
    plan = config.optimiser
    validations = 1 + plan.steps // config.validation.every + bool(plan.steps % config.validation.every)
    durations = []
    for one in known:
        study = studies[_target(one, here)]
        seconds = study.measured(here) if one is None else study.estimated(one)
        for count in processes:
            durations.append(_duration(config, work, study, one, count, seconds, validations))
    prompts = sum(len(batch) for batch in work.batches)
    return Plan(
        first.backbone.name,
        first.backbone.kind,
        _parameters(first),
        plan.steps,
        validations if validation_tasks else 0,
        Batches(
            prompts / len(work.batches),
            work.tokens / len(work.batches),
            1 - work.tokens / work.positions,
            max(size.longest for size in work.sizes),
            len(work.batches),
        ),
        work.compose_seconds,
        tuple(study.forecast() for study in studies.values()),
        tuple(durations),
    )


def _target(one: Accelerator | None, here: torch.device) -> Target:
    if one is None:
        if here.type == "cuda":
            return "cuda" if torch.cuda.is_bf16_supported() else "cuda without bf16"
        if here.type != "cpu":
            raise ConfigError(f"backbone.device: a plan cannot time a device of type {here.type}; name an accelerator")
        return "cpu"
    return "cuda" if one.has_bf16 else "cuda without bf16"


def _model(config: WarmupConfig, target: Target) -> MarkupModel:
    backbone = Skeleton.build(config.backbone, target)
    # Tags near descriptions would take as many rows.
    return Start.of(config, backbone, compares=False).model(replace(config, initialisation="normal"), backbone)


def _parameters(model: MarkupModel) -> Parameters:
    backbone, table = model.backbone, model.table
    assert table is not None
    sizes = {id(p): p.numel() for p in backbone.model.parameters()}
    rows = {id(p): p.numel() for p in backbone.embedding.parameters()}
    head = {id(p): p.numel() for p in backbone.model.get_output_embeddings().parameters() if id(p) not in rows}
    embedding, top = sum(rows.values()), sum(head.values())
    layers = sum(sizes.values()) - embedding - top
    trained, frozen = table.rows.numel(), table.frozen.numel()
    return Parameters(sum(sizes.values()), embedding, layers, top, trained + frozen, trained)


def _per_step(config: WarmupConfig, processes: int) -> int:
    """Return the batches of a step: a multiple of the processes, as a warm-up wants it."""
    return -(-config.optimiser.batches_per_step // processes) * processes


def _duration(
    config: WarmupConfig,
    work: Workload,
    study: Study,
    on: Accelerator | None,
    processes: int,
    curves: tuple[Curve, Curve],
    validations: int,
) -> Duration:
    plan = config.optimiser
    per_step = _per_step(config, processes)
    whole, forward = curves
    busiest = [
        max(sum(whole.at(work.sizes[i]) for i in step[rank::processes]) for rank in range(processes))
        for step in work.steps(per_step)
    ]
    computing = sum(busiest) / len(busiest)
    # Every process composes every batch: what it draws is a function of the seed alone.
    composing = work.compose_seconds * work.episodes / len(work.batches) * per_step
    on_cpu = study.target == "cpu"
    workers = (0 if on_cpu else 2) if config.workers is None else config.workers
    seconds = max(computing, composing / workers) if workers else computing + composing
    seconds += REDUCTION_SECONDS if processes > 1 else 0.0
    validation = forward.of_prompts(work.validation, plan.batch_tokens) if work.validation else 0.0
    fits = None
    if on is not None:
        fits = study.memory().total <= (on.memory - CONTEXT_GIB) * 2**30
    return Duration(
        HERE if on is None else on.name,
        processes,
        per_step,
        seconds,
        validation,
        plan.steps * seconds + (validations * validation if work.validation else 0.0),
        work.tokens / len(work.batches) * per_step / seconds,
        fits,
    )
