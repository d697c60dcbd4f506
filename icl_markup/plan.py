"""A warm-up's plan: parameters, memory, FLOPs and time, found before it runs and without any weights.

The warm-up's own batches are composed, and its own forward and backward pass run on a model of fake tensors
(`icl_markup.skeleton`), which `icl_markup.costs` watches. So nothing here knows an architecture, and whatever
transformers builds can be planned.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses import fake_tensor

from icl_markup.costs import HERE, Accelerator, Costs, accelerator, measured
from icl_markup.episodes import EpisodeSampler
from icl_markup.errors import BackboneError, ConfigError
from icl_markup.loading import device_of
from icl_markup.model import MarkupModel
from icl_markup.preparation import prepared
from icl_markup.readers import read_task
from icl_markup.skeleton import Skeleton, Target
from icl_markup.start import Start
from icl_markup.stream import Item, PromptStream, prompts_of
from icl_markup.tasks import Task
from icl_markup.warmup import for_tasks
from icl_markup.warmup_config import WarmupConfig

_LEAST_BATCHES, _MOST_WINDOWS, _WATCHED = 32, 16, 4
_CONTEXT_BYTES = 2**30
"""Assumed: what the driver, the libraries and the allocator's gaps take of an accelerator's memory."""

_UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


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
    """What batches are like: means, and the longest sequence in tokens."""

    prompts: float
    tokens: float
    padding: float
    longest: int
    batches_seen: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a process has at its peak, in the largest batch; the program and its libraries are not in it.

    Attributes:
        weights: of the backbone, with buffers.
        tags: the table in fp32, its gradient, AdamW's two moments, the best rows so far and frozen ones.
        activations: everything else: what is kept for the backward pass, casts of weights, temporary tensors.
    """

    weights: int
    tags: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.tags + self.activations


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a batch (the mean over batches), a multiply-add counted as two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Forecast:
    """What a run is like on one kind of device: how ``auto`` is settled there, memory and FLOPs."""

    target: Target
    dtype: str
    precision: str
    attention: str
    quantisation: str
    memory: Memory
    flops: Flops


@dataclass(frozen=True)
class Duration:
    """The time of a run.

    Attributes:
        accelerator: its name.
        processes: how many of them, an accelerator each.
        batches_per_step: as configured, or the next multiple of the processes.
        step_seconds: of a step: a process's share of its batches, and composing where nothing overlaps it.
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
        accelerators: names of `icl_markup.costs.ACCELERATORS`, or ``here``: this machine, whose rates are measured.
        processes: numbers of processes.
        tasks: tasks already read, instead of `config.tasks`.
        validation_tasks: the same for `config.validation_tasks`.

    Raises:
        ConfigError: an accelerator is not known, or a number of processes is not positive.
        BackboneError: the model cannot be built from its configuration, or not be run without numbers.
        MarkupError: what a warm-up would not begin with either.
    """
    if not accelerators or not processes or min(processes) < 1:
        raise ConfigError("a plan is for one accelerator or more, and for numbers of processes above zero")
    here = device_of(config.backbone.device)
    known = [None if name == HERE else accelerator(name) for name in accelerators]
    targets = [_target(one, here) for one in known]
    tasks = list(tasks if tasks is not None else [read_task(source) for source in config.tasks])
    if config.most_tasks is not None:
        tasks = random.Random(config.seed).sample(tasks, min(config.most_tasks, len(tasks)))
    if validation_tasks is None:
        validation_tasks = [read_task(source) for source in config.validation_tasks]
    models = {target: _model(config, target) for target in dict.fromkeys(targets)}
    first = models[targets[0]]
    sampler = EpisodeSampler(tasks, for_tasks(config.episodes, tasks, config.most_tasks), config.seed)
    batches, compose_seconds, episodes = _drawn(config, first, sampler)
    tokens = [sum(item.tokens for item in batch) for batch in batches]
    sizes = [len(batch) * max(item.tokens for item in batch) for batch in batches]
    validated = sum(_validation_tokens(config, first, task) for task in validation_tasks)
    steps, every = config.optimiser.steps, config.validation.every
    validations = 1 + -(-steps // every) if validation_tasks else 0
    forecasts: dict[Target, Forecast] = {}
    durations = []
    on = [measured(here) if one is None else one for one in known]
    for target, model in models.items():
        mine = [one for one, of in zip(on, targets, strict=True) if of == target]
        watched = _watched(sizes)
        costs = [observed(model, batches[i], config.supervise == "all", mine) for i in watched]
        share = sum(tokens[i] for i in watched)  # of what was watched; the rest costs as much a token
        mean = sum(tokens) / len(batches)
        flops = Flops(*(mean / share * sum(one.flops[phase] for one in costs) for phase in ("forward", "backward")))
        forecasts[target] = _forecast(target, model, max(one.peak for one in costs), flops)
        for one in mine:
            token = sum(found.seconds(one, "forward", "backward") for found in costs) / share
            read = sum(found.seconds(one, "forward") for found in costs) / share
            composing = compose_seconds * episodes / len(batches)
            for count in processes:
                per_step = -(-config.optimiser.batches_per_step // count) * count
                seconds = _step_seconds(config, target, token * mean * per_step / count, composing * per_step)
                validation = read * validated
                room = None if one.memory is None else one.memory - _CONTEXT_BYTES
                fits = None if room is None else forecasts[target].memory.total <= room
                total = steps * seconds + validations * validation
                durations.append(
                    Duration(one.name, count, per_step, seconds, validation, total, mean * per_step / seconds, fits)
                )
    order = {name: number for number, name in enumerate(accelerators)}
    return Plan(
        first.backbone.name,
        first.backbone.kind,
        _parameters(first),
        steps,
        validations,
        Batches(
            sum(len(item.prompts) for batch in batches for item in batch) / len(batches),
            sum(tokens) / len(batches),
            1 - sum(tokens) / sum(sizes),
            max(item.tokens for batch in batches for item in batch),
            len(batches),
        ),
        compose_seconds,
        tuple(forecasts.values()),
        tuple(sorted(durations, key=lambda one: order[one.accelerator])),
    )


def observed(
    model: MarkupModel, items: Sequence[Item], all_slots: bool, accelerators: Sequence[Accelerator] = ()
) -> Costs:
    """Run a warm-up's forward and backward pass on one batch, and watch what it costs.

    Args:
        model: the model, of fake tensors or real ones.
        items: the batch.
        all_slots: whether every slot is trained on.
        accelerators: what to find the time on.

    Raises:
        BackboneError: what a model of fake tensors does depends on numbers that it computes.
    """
    assert model.table is not None
    backbone = model.backbone
    if backbone.kind == "causal":  # is found out at first use, which is none of the batch's cost
        assert backbone.exactness and backbone.sees_nothing_ahead is not None
    elif backbone.kind == "seq2seq":
        assert backbone.shares_names is not None
    weights = [*backbone.model.parameters(), *backbone.model.buffers(), *model.table.parameters()]
    costs = Costs(weights, accelerators)
    try:
        with prepared(backbone) as casts, costs:
            costs.alive = costs.peak = casts
            loss = model.loss_terms(*prompts_of(items), all_slots).loss(name_share=1.0)
            costs.phase = "backward"
            loss.backward()
    except _UNKNOWN as error:
        name = type(backbone.model).__name__
        raise BackboneError(f"{name} cannot be planned without its weights: {error}") from error
    model.table.rows.grad = None
    return costs


def _target(one: Accelerator | None, here: torch.device) -> Target:
    if one is not None:
        return "cuda" if one.has_bf16 else "cuda without bf16"
    if here.type == "cuda":
        return "cuda" if torch.cuda.is_bf16_supported() else "cuda without bf16"
    if here.type != "cpu":
        raise ConfigError(f"backbone.device: a plan cannot time a device of type {here.type}; name an accelerator")
    return "cpu"


def _model(config: WarmupConfig, target: Target) -> MarkupModel:
    backbone = Skeleton.build(config.backbone, target)
    # Tags near descriptions would take as many rows.
    return Start.of(config, backbone, compares=False).model(replace(config, initialisation="normal"), backbone)


def _drawn(
    config: WarmupConfig, model: MarkupModel, sampler: EpisodeSampler
) -> tuple[list[tuple[Item, ...]], float, int]:
    """Draw whole windows until there are batches enough to speak of a mean.

    Returns:
        The batches, the time in which this machine composed an episode, and how many episodes there were.
    """
    plan = config.optimiser
    stream = PromptStream(model.markup, sampler, window=plan.window, batch_tokens=plan.batch_tokens,
                          batches_per_step=1, tokens=model.tokens_of)  # fmt: skip
    batches: list[tuple[Item, ...]] = []
    began, windows = time.perf_counter(), 0
    while len(batches) < _LEAST_BATCHES and windows < _MOST_WINDOWS:
        batches += stream.window_at(windows)[0]
        windows += 1
    episodes = windows * plan.window
    return batches, (time.perf_counter() - began) / episodes, episodes


def _watched(sizes: Sequence[int]) -> list[int]:
    """Return the batches to look at: the largest, which decides the memory, and some of all sizes."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    return sorted({order[-1], *(order[i * len(order) // _WATCHED] for i in range(_WATCHED))})


def _validation_tokens(config: WarmupConfig, model: MarkupModel, task: Task) -> int:
    plan = config.validation
    sampler = EpisodeSampler([task], plan.episode_config, seed=config.seed)
    episodes = [sampler.episode(0, i) for i in range(plan.episodes)]
    return sum(model.tokens_of(model.markup.compose_each(episode), episode) for episode in episodes)


def _forecast(target: Target, model: MarkupModel, peak: int, flops: Flops) -> Forecast:
    backbone, table = model.backbone, model.table
    assert isinstance(backbone, Skeleton) and table is not None
    # Trained rows with gradient, two moments and the best ones; frozen rows twice.
    tags = 4 * (5 * table.rows.numel() + 2 * table.frozen.numel())
    attention = getattr(backbone.model.config, "_attn_implementation", None) or "eager"
    dtype = str(backbone.dtype).removeprefix("torch.")
    memory = Memory(backbone.weight_bytes, tags, peak)
    return Forecast(target, dtype, backbone.precision, attention, backbone.form, memory, flops)


def _step_seconds(config: WarmupConfig, target: Target, computing: float, composing: float) -> float:
    """Return the time of a step: every process composes every batch, in workers or between steps."""
    workers = (0 if target == "cpu" else 2) if config.workers is None else config.workers
    return max(computing, composing / workers) if workers else computing + composing


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
