"""One optimiser step of a warm-up: given to the device, and read when the next one has been given to it.

Reading a number off a device waits for everything before it. A step that read its own loss would leave an accelerator
idle while the next batch is prepared; here a step reads nothing, and copies its few numbers aside for later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from icl_markup.model import MarkupModel
from icl_markup.stream import Step, prompts_of
from icl_markup.warmup_config import OptimiserConfig


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        metrics: its line of ``metrics.jsonl``, without the step's number.
        tokens: tokens of all its prompts.
        positions: the same with padding.
        stop: whether a process was told to stop when it began the step.
        defect: what was not finite, and its value, such as ``"loss became nan"``; empty where all was.
    """

    metrics: dict[str, Any]
    tokens: int
    positions: int
    stop: bool
    defect: str


class Launched:
    """A step that was given to the device.

    Args:
        numbers: loss, right answers, processes told to stop and the gradient's norm, on the device.
        rows: the table's rows after the step.
        known: what is known of it without asking the device.
        scales: whether a loss scaler skips steps whose gradient is not finite.
    """

    def __init__(self, numbers: Tensor, rows: Tensor, known: dict[str, Any], positions: int, *, scales: bool):
        self.rows = rows
        self._known = known
        self._positions = positions
        self._scales = scales
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers

    def read(self) -> Outcome:
        """Wait for the step, and return what it came to."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, right, stop, norm = self._numbers.tolist()
        defect = ""
        if not math.isfinite(loss):
            defect = f"loss became {loss}"
        elif not math.isfinite(norm) and not self._scales:  # a loss scaler skips such steps by itself
            defect = f"gradient's norm became {norm}"
        tokens, slots = self._known["tokens"], self._known["slots"]
        metrics = {
            "loss": loss,
            "accuracy": right / slots,
            "learning_rate": self._known["learning_rate"],
            "gradient_norm": norm if math.isfinite(norm) else None,
            "slots": slots,
            "tokens": tokens,
            "padding": 1 - tokens / self._positions,
            **{name: self._known[name] for name in ("shortened", "dropped", "skipped")},
        }
        return Outcome(metrics, tokens, self._positions, stop > 0, defect)


class TagOptimiser:
    """Trains the trainable rows of a model's tag table: AdamW without weight decay.

    Args:
        model: the model.
        plan: how to train.
        learning_rate: the peak learning rate.
        all_slots: train on every slot of a prompt, or on the queries' alone.
        accelerator: the processes that share the batches of a step.

    Attributes:
        raw: the optimiser itself, for its state.
        scheduler: the learning rate's schedule.
    """

    def __init__(
        self, model: MarkupModel, plan: OptimiserConfig, learning_rate: float, all_slots: bool, accelerator: Accelerator
    ):
        assert model.table is not None
        self.model = model
        self.table = model.table
        self.all_slots = all_slots
        self.name_share = plan.name_share
        self.clip = plan.gradient_clip
        self.accelerator = accelerator
        self.raw = torch.optim.AdamW([self.table.rows], lr=learning_rate, weight_decay=0.0)
        self.scheduler = get_scheduler(
            plan.schedule, self.raw, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.steps
        )
        self._prepared = accelerator.prepare_optimizer(self.raw)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the states of the schedule and of fp16's loss scaling, the latter empty where there is none."""
        found = self.scheduler.state_dict()
        schedule = {name: found[name] for name in ("last_epoch", "_step_count", "_last_lr")}
        return schedule, {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def restore(self, schedule: dict[str, Any], loss_scale: dict[str, Any]) -> None:
        """Go on from what `state` returned; the moments are restored in `raw`."""
        if self.accelerator.scaler is not None and loss_scale:
            self.accelerator.scaler.load_state_dict(loss_scale)
        if schedule:
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **schedule})
            for group, rate in zip(self.raw.param_groups, self.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def launch(self, step: Step, stop: bool = False) -> Launched:
        """Give a step to the device; nothing is read from it.

        Args:
            step: the batches of all processes, of which this one takes its share.
            stop: whether this process was told to stop. All must do so after the same step, or one would wait for the
                others for ever: so it is added up like the loss.
        """
        accelerator = self.accelerator
        items = [item for batch in step.batches for item in batch]
        slots = sum(item.slots(all_slots=self.all_slots) for item in items)
        sums = torch.zeros(3, device=self.table.rows.device)
        sums[2].fill_(float(stop))
        for batch in step.batches[accelerator.process_index :: accelerator.num_processes]:
            terms = self.model.loss_terms(*prompts_of(batch), self.all_slots)
            loss = terms.loss(self.name_share) / slots
            accelerator.backward(loss)
            sums[0] += loss.detach().float()
            sums[1] += (terms.scores.argmax(-1) == terms.targets).sum()
        rows = self.table.rows
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
            rows.grad = accelerator.reduce(rows.grad, "sum")
        norm = torch.as_tensor(accelerator.clip_grad_norm_([rows], self.clip), device=rows.device)
        known = {
            "learning_rate": self.scheduler.get_last_lr()[0],
            "slots": slots,
            "tokens": sum(item.tokens for item in items),
            "shortened": sum(prompt.shortened for item in items for prompt in item.prompts),
            "dropped": sum(prompt.dropped for item in items for prompt in item.prompts),
            "skipped": step.skipped,
        }
        self._prepared.step()
        self.scheduler.step()
        self._prepared.zero_grad()
        numbers = torch.cat([sums, norm.detach().float().reshape(1)])
        scales = accelerator.scaler is not None
        return Launched(numbers, rows.detach().clone(), known, self._positions(step.batches), scales=scales)

    def _positions(self, batches: Sequence[Sequence[Any]]) -> int:
        return sum(max(item.tokens for item in batch) * len(batch) for batch in batches)
