"""What batches of a warm-up cost: its own forward and backward pass, watched by a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from icl_markup.accelerators import Accelerator, roofline
from icl_markup.backbone import Backbone
from icl_markup.errors import BackboneError
from icl_markup.ledger import Ledger
from icl_markup.model import MarkupModel
from icl_markup.preparation import prepared
from icl_markup.replay import Stopwatch
from icl_markup.skeleton import Skeleton, Target
from icl_markup.stream import Item, prompts_of
from icl_markup.workload import Curve, Workload

_UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Memory:
    """Bytes that a process has at its peak, in the largest batch, by part.

    Attributes:
        weights: of the backbone, with buffers.
        tags: the table in fp32, its gradient, AdamW's two moments, the best rows so far and frozen ones.
        casts: copies of weights in another type, which autocast makes and the backward pass needs.
        activations: everything else that is alive between forward and backward pass.
        temporary: what comes on top of it at the peak.
    """

    weights: int
    tags: int
    casts: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """All of it; the program itself and its libraries are not in it."""
        return self.weights + self.tags + self.casts + self.activations + self.temporary


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a batch (the mean over batches), a multiply-add counted as two.

    Attributes:
        forward: the model up to its head.
        attention: how much of that is attention's products of tokens with tokens.
        head: logits of candidates.
        backward: through activations alone, as no weight has a gradient; with what gradient checkpointing repeats.
    """

    forward: float
    attention: float
    head: float
    backward: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.head + self.backward


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


class Study:
    """Some batches of a workload, run on a model without weights.

    Args:
        target: what the model is for.
        model: the model.
        all_slots: whether every slot is trained on.
        work: the batches.

    Attributes:
        ledgers: a ledger a batch.
        alive: bytes alive between forward and backward pass, and how many of them are casts, a batch.

    Raises:
        BackboneError: what the model does depends on numbers that it computes.
    """

    def __init__(self, target: Target, model: MarkupModel, all_slots: bool, work: Workload):
        self.target, self.model, self.work = target, model, work
        sampled = work.samples()
        self.sizes = [work.sizes[index] for index in sampled]
        self.ledgers: list[Ledger] = []
        self.alive: list[tuple[int, int]] = []
        for index in sampled:
            ledger, alive = observed(model, work.batches[index], all_slots)
            self.ledgers.append(ledger)
            self.alive.append(alive)

    def estimated(self, on: Accelerator) -> tuple[Curve, Curve]:
        """Return the seconds of a batch on a named accelerator: all of it, and its forward pass."""
        both = [
            (roofline(one.operations.values(), on), roofline(one.operations.values(), on, "body", "head"))
            for one in self.ledgers
        ]
        return Curve.through(self.sizes, [b[0] for b in both]), Curve.through(self.sizes, [b[1] for b in both])

    def measured(self, device: torch.device) -> tuple[Curve, Curve]:
        """Return the same for this machine, on which every operation is timed."""
        watch = Stopwatch(device)
        both = [
            (watch.seconds(one.operations.items()), watch.seconds(one.operations.items(), "body", "head"))
            for one in self.ledgers
        ]
        return Curve.through(self.sizes, [b[0] for b in both]), Curve.through(self.sizes, [b[1] for b in both])

    def memory(self) -> Memory:
        """Return the memory of a process at its peak."""
        backbone = self.model.backbone
        assert isinstance(backbone, Skeleton)
        worst = max(range(len(self.ledgers)), key=lambda i: self.ledgers[i].peak)
        alive, casts = self.alive[worst]
        temporary = self.ledgers[worst].peak - alive
        return Memory(backbone.weight_bytes, tag_bytes(self.model), casts, alive - casts, temporary)

    def forecast(self) -> Forecast:
        """Return memory at the peak, and the mean of FLOPs over batches."""
        backbone = self.model.backbone
        assert isinstance(backbone, Skeleton)
        flops = Flops(
            self._mean([one.flops("body") for one in self.ledgers]),
            self._mean([one.flops("body", attention=True) for one in self.ledgers]),
            self._mean([one.flops("head") for one in self.ledgers]),
            self._mean([one.flops("backward") for one in self.ledgers]),
        )
        attention = getattr(backbone.model.config, "_attn_implementation", None) or "eager"
        dtype = str(backbone.dtype).removeprefix("torch.")
        return Forecast(self.target, dtype, backbone.precision, attention, backbone.form, self.memory(), flops)

    def _mean(self, costs: Sequence[float]) -> float:
        curve = Curve.through(self.sizes, costs)
        return sum(curve.at(size) for size in self.work.sizes) / len(self.work.sizes)


def observed(model: MarkupModel, items: Sequence[Item], all_slots: bool) -> tuple[Ledger, tuple[int, int]]:
    """Run a warm-up's forward and backward pass on one batch, and watch it.

    Args:
        model: the model, of fake tensors or real ones.
        items: the batch.
        all_slots: whether every slot is trained on.

    Returns:
        The ledger, and the bytes alive between the passes, in all and of casts.

    Raises:
        BackboneError: what a model of fake tensors does depends on numbers that it computes.
    """
    assert model.table is not None
    backbone = model.backbone
    if backbone.kind == "causal":  # is found out at first use, which is none of the batch's cost
        assert backbone.exactness and backbone.sees_nothing_ahead is not None
    elif backbone.kind == "seq2seq":
        assert backbone.shares_names is not None
    ledger = Ledger([*backbone.model.parameters(), *backbone.model.buffers(), *model.table.parameters()])
    try:
        with prepared(backbone) as casts, ledger, _head_noted(backbone, ledger):
            ledger.alive = ledger.peak = ledger.casts = casts
            loss = model.loss_terms(*prompts_of(items), all_slots).loss(name_share=1.0)
            alive = (ledger.alive, ledger.casts)
            ledger.phase = "backward"
            loss.backward()
    except _UNKNOWN as error:
        raise BackboneError(
            f"{type(backbone.model).__name__} cannot be planned without its weights: {error}"
        ) from error
    model.table.rows.grad = None
    return ledger, alive


def tag_bytes(model: MarkupModel) -> int:
    """Return the bytes of tags in a warm-up: trained rows with gradient, two moments and the best ones; frozen ones."""
    assert model.table is not None
    return 4 * (5 * model.table.rows.numel() + 2 * model.table.frozen.numel())


@contextmanager
def _head_noted(backbone: Backbone, ledger: Ledger) -> Iterator[None]:
    """While active, what follows the model itself is noted as the head's."""

    def noting(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Tensor) -> Tensor:
            ledger.phase = "head"
            return read(*given)

        return call

    names = ("logits_at", "log_probs_at")
    for name in names:
        setattr(backbone, name, noting(getattr(backbone, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(backbone, name)
