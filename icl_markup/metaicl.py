"""MetaICL: meta-trains the backbone itself, by LoRA or in full, on the episodes that tags are warmed up on.

The baseline of Min et al. 2022 (arXiv 2110.15943): the same stream of episodes, seed, steps, budget of tokens,
schedule and choice of the best step as a warm-up of tags, in a template of plain words. A batch is a number of
tokens, so a template with other words packs other numbers of the same episodes into a step. Dropout is off, as in
a warm-up. A run continues from its last checkpoint by itself, and a finished one is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import get_scheduler

from icl_markup.answers import AUTO, default_answers, default_wording
from icl_markup.backbone import Backbone
from icl_markup.chat import NO_CHAT
from icl_markup.checkpoint import Progress, drop_checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from icl_markup.config import to_dict
from icl_markup.episodes import Episode, EpisodeSampler
from icl_markup.errors import WarmupError
from icl_markup.evaluation import answer_queries
from icl_markup.files import append_line
from icl_markup.fingerprint import Fingerprint
from icl_markup.lock import only_run
from icl_markup.metaicl_config import MetaIclConfig
from icl_markup.metaicl_model import DETAILS, Trainee, check_whole, load_metaicl, read_details, save_trainee
from icl_markup.model import MarkupModel
from icl_markup.readers import read_task, without_storage
from icl_markup.run_folder import METRICS, open_output, writing
from icl_markup.stream import Position, PromptStream, Step, prompts_of
from icl_markup.tasks import Task
from icl_markup.template import Template

__all__ = ["MetaIclConfig", "MetaIclResult", "load_metaicl", "run_metaicl"]


@dataclass(frozen=True)
class MetaIclResult:
    """What a run made.

    Attributes:
        model: the trained copy of the backbone, with its best weights.
        folder: where it is; `load_metaicl` loads it.
        parameters: the number of trained parameters.
        summary: what was trained on, how long, and how well it validated.
    """

    model: MarkupModel
    folder: Path
    parameters: int
    summary: dict[str, Any]


def run_metaicl(
    config: MetaIclConfig,
    *,
    tasks: Sequence[Task] | None = None,
    validation_tasks: Sequence[Task] | None = None,
    backbone: Backbone | None = None,
    progress: bool = True,
) -> MetaIclResult:
    """Train a copy of the backbone and save its best weights, in one process.

    Args:
        config: everything about the run.
        tasks: tasks already read, instead of `config.tasks`.
        validation_tasks: the same for `config.validation_tasks`.
        backbone: a backbone already loaded, instead of `config.backbone`; it stays as it is, to the bit.
        progress: show a progress bar.

    Returns:
        The model with its best weights, saved in ``OUTPUT/model``. A run that is finished there is loaded, and one
        that is not continues.

    Raises:
        WarmupError: `output` holds another run or is another's at the moment, it cannot be written, the template has
            tags, the backbone is split over processes, or the loss is not finite.
        MarkupError: the backbone, the template or a task cannot be used.
    """
    if config.template != AUTO:
        _plain(config.template)  # before a backbone is loaded
    backbone = backbone or Backbone.load(config.backbone)
    answers = default_answers(backbone.kind, backbone.parameters) if config.answers == "auto" else config.answers
    template = _plain(default_wording(answers) if config.template == AUTO else config.template)
    check_whole(backbone)
    tasks = tasks if tasks is not None else [read_task(source) for source in config.tasks]
    validation_tasks = (
        validation_tasks if validation_tasks is not None else [read_task(s) for s in config.validation_tasks]
    )
    fingerprint = Fingerprint.of(backbone)
    identity = {
        "config": without_storage(to_dict(replace(config, output="", save_every=1))),
        "template": {"name": Path(template.name).stem, "source": template.source},
        "data_sha256": _data_hash([*tasks, *validation_tasks]),
        "fingerprint": fingerprint.to_json(),
        "backbone": {"name": backbone.name, "revision": backbone.revision, "kind": backbone.kind,
                     "quantisation": backbone.quantisation},
    }  # fmt: skip
    out = Path(config.output)
    folder = out / "model"
    if (folder / DETAILS).exists():
        details = read_details(folder)
        _refuse_another(folder, identity, details)
        model, parameters = load_metaicl(folder, backbone)
        with suppress(OSError):  # a run that was killed between its last two acts has left one
            drop_checkpoint(out)
        return MetaIclResult(model, folder, parameters, details["summary"])
    with only_run(out, WarmupError, folder=True):
        run = _Run(config, template, backbone, identity, tasks, validation_tasks)
        run.train(progress)
        if backbone.checksum() != fingerprint.weights_sha256:
            raise WarmupError("the weights of the backbone that was given changed; the trained copy was not saved")
        summary = run.summary()
        save_trainee(run.trainee, run.model, folder, {**identity, "summary": summary})
        drop_checkpoint(out)
    return MetaIclResult(run.model, folder, run.trainee.count, summary)


def _plain(name: str) -> Template:
    template = Template.load(name)
    if not template.is_plain:
        raise WarmupError(f"template {template.name!r} has tags, which MetaICL does not train; take one in plain words")
    return template


class _Run:
    def __init__(
        self,
        config: MetaIclConfig,
        template: Template,
        backbone: Backbone,
        identity: dict[str, Any],
        tasks: Sequence[Task],
        validation_tasks: Sequence[Task],
    ):
        plan = config.optimiser
        self.config = config
        self.identity = identity
        self.out = Path(config.output)
        self.task_names = [task.name for task in tasks]
        self.notes = [f"{task.name}: {note}" for task in [*tasks, *validation_tasks] for note in task.notes]
        self.validation = [(task.name, self._validation_episodes(task)) for task in validation_tasks]
        self.trainee = Trainee.of(backbone, config)
        twin = self.trainee.backbone
        self.model = MarkupModel(
            twin,
            template,
            answers=config.answers,
            length_normalised=config.length_normalised,
            chat=config.chat,
        )
        self.stream = PromptStream(
            self.model.markup,
            EpisodeSampler(tasks, config.episodes, config.seed),
            window=plan.window,
            batch_tokens=plan.batch_tokens,
            batches_per_step=plan.batches_per_step,
            tokens=self.model.tokens_of,
        )
        self.optimizer = torch.optim.AdamW(self.trainee.weights, lr=config.peak_rate, weight_decay=config.weight_decay)
        self.scheduler = get_scheduler(
            plan.schedule, self.optimizer, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.steps
        )
        self.scaler = torch.amp.GradScaler(twin.device.type, enabled=twin.precision == "fp16")
        self.progress = Progress()
        self.best = self.trainee.vector() if self.validation else None

    def train(self, show_progress: bool) -> None:
        """Train from the last checkpoint, or the beginning, to the end, and put the best weights in place."""
        plan, validation = self.config.optimiser, self.config.validation
        self._open_output()
        state = self.progress
        if state.step == 0:
            self._validate()
        with tqdm(
            total=plan.steps, initial=state.step, desc=self.config.method, unit="step", disable=not show_progress
        ) as bar:
            for step in self.stream.steps(Position(state.window, state.batch)):
                if state.step >= plan.steps or (validation.patience is not None and state.stale >= validation.patience):
                    break
                metrics = self._step(step)
                state.step += 1
                state.window, state.batch = step.after
                if not self.validation:
                    state.best_step = state.step
                self._log({"step": state.step, **metrics})
                shown = {"loss": f"{metrics['loss']:.3f}"}
                if self.validation:
                    shown["best"] = f"{state.best_accuracy:.3f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
                last = state.step == plan.steps
                if state.step % validation.every == 0 or last:
                    self._validate()
                if state.step % self.config.save_every == 0 or last:
                    self._save()
        if self.best is not None:
            self.trainee.restore(self.best)
        self.model.backbone.model.requires_grad_(False)

    def summary(self) -> dict[str, Any]:
        """Return what the run did."""
        state = self.progress
        summary: dict[str, Any] = {
            "method": self.config.method,
            "tasks": self.task_names,
            "validation tasks": [name for name, _ in self.validation],
            "steps": state.step,
            "best step": state.best_step,
            "learning rate": self.config.peak_rate,
            "trained parameters": self.trainee.count,
            "precision": self.trainee.backbone.precision,
            "padding": round(1 - state.tokens / state.positions, 4) if state.positions else 0.0,
            "seed": self.config.seed,
        }
        if self.validation:
            summary["validation accuracy"] = state.best_accuracy
        if self.notes:
            summary["notes on the data"] = self.notes
        return summary

    def _open_output(self) -> None:
        if has_checkpoint(self.out):
            now, best, self.progress, before = load_checkpoint(self.out, self.optimizer)
            _refuse_another(self.out, self.identity, before)
            self.trainee.restore(now)
            self.best = best if self.validation else None
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **self.progress.schedule})
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            if self.progress.loss_scale:
                self.scaler.load_state_dict(self.progress.loss_scale)
        open_output(self.out, self.config, self.progress.step)

    def _step(self, step: Step) -> dict[str, Any]:
        all_slots = self.config.supervise == "all"
        items = [item for batch in step.batches for item in batch]
        total_slots = sum(item.slots(all_slots=all_slots) for item in items)
        loss_sum, right, positions = 0.0, 0, 0
        tokens = sum(item.tokens for item in items)
        for batch in step.batches:
            terms = self.model.loss_terms(*prompts_of(batch), all_slots)
            loss = terms.loss(self.config.optimiser.name_share) / total_slots
            self.scaler.scale(loss).backward()
            loss_sum += float(loss.detach())
            right += int((terms.scores.argmax(-1) == terms.targets).sum())
            positions += max(item.tokens for item in batch) * len(batch)
        if not math.isfinite(loss_sum):
            self._fail_on("loss", loss_sum)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainee.weights, self.config.optimiser.gradient_clip))
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a loss scaler skips such steps by itself
            self._fail_on("gradient's norm", norm)
        rate = self.scheduler.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.tokens += tokens
        self.progress.positions += positions
        return {
            "loss": loss_sum,
            "accuracy": right / total_slots,
            "learning_rate": rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "slots": total_slots,
            "tokens": tokens,
            "padding": 1 - tokens / positions,
            "shortened": sum(prompt.shortened for item in items for prompt in item.prompts),
            "dropped": sum(prompt.dropped for item in items for prompt in item.prompts),
            "skipped": step.skipped,
        }

    def _fail_on(self, what: str, value: float) -> None:
        raise WarmupError(
            f"the {what} became {value} at step {self.progress.step + 1}; lower learning_rate or use fp32"
        )

    def _validation_episodes(self, task: Task) -> list[Episode]:
        """Draw the episodes that a warm-up of tags with this seed validates on."""
        plan = self.config.validation
        sampler = EpisodeSampler([task], plan.episode_config, seed=self.config.seed)
        return [sampler.episode(0, i) for i in range(plan.episodes)]

    def _validate(self) -> None:
        if not self.validation:
            return
        state = self.progress
        accuracy, loss = [], []
        for _, episodes in self.validation:
            answers = answer_queries(self.model, episodes, self.config.optimiser.batch_tokens)
            accuracy.append(float(answers.correct.mean()))
            loss.append(float(answers.loss.mean()))
        mean, mean_loss = sum(accuracy) / len(accuracy), sum(loss) / len(loss)
        by_task = {f"validation_{name}": a for (name, _), a in zip(self.validation, accuracy, strict=True)}
        self._log({"step": state.step, "validation_accuracy": mean, "validation_loss": mean_loss, **by_task})
        if (mean, -mean_loss) > (state.best_accuracy, -state.best_loss):
            state.best_accuracy, state.best_loss, state.best_step = mean, mean_loss, state.step
            state.stale = 0
            self.best = self.trainee.vector()
        else:
            state.stale += 1

    def _log(self, metrics: dict[str, Any]) -> None:
        with writing(self.out):
            append_line(self.out / METRICS, json.dumps(metrics))

    def _save(self) -> None:
        schedule = self.scheduler.state_dict()
        self.progress.schedule = {name: schedule[name] for name in ("last_epoch", "_step_count", "_last_lr")}
        self.progress.loss_scale = self.scaler.state_dict()
        now = self.trainee.vector()
        best = now[:0] if self.best is None else self.best
        with writing(self.out):
            save_checkpoint(self.out, now, best, self.optimizer, self.progress, self.identity)


def _refuse_another(where: Path, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise a WarmupError where a run on disk is not the one that is asked for."""
    before = {"chat": NO_CHAT, **theirs["config"]}
    changed = [f"{name} ({before.get(name)!r})" for name, value in mine["config"].items() if value != before.get(name)]
    if mine["template"]["source"] != theirs["template"]["source"]:
        changed.append("text in its template")
    if mine["data_sha256"] != theirs["data_sha256"]:
        changed.append("content of its tasks")
    if Fingerprint.from_json(theirs["fingerprint"]).difference(Fingerprint.from_json(mine["fingerprint"])):
        changed.append(f"backbone ({theirs['backbone']['name']!r})")
    if changed:
        raise WarmupError(f"{where}: holds a run with another {changed[0]}; choose another output, or delete it")


def _data_hash(tasks: Sequence[Task]) -> str:
    """Return the SHA-256 of tasks' content as one JSON list, which is never held as a whole: tasks may be large."""
    digest = hashlib.sha256()
    for text in _json_of(tasks):
        digest.update(text.encode())
    return digest.hexdigest()


def _json_of(tasks: Sequence[Task]) -> Iterator[str]:
    yield "["
    for number, task in enumerate(tasks):
        yield f"{', ' if number else ''}[{json.dumps(task.name)}, {json.dumps(task.labels)}, ["
        for place, split in enumerate(sorted(task.splits)):
            yield f"{', ' if place else ''}[{json.dumps(split)}, ["
            for row, e in enumerate(task.splits[split]):
                yield f"{', ' if row else ''}{json.dumps([e.text, e.label])}"
            yield "]]"
        rest = (sorted(task.descriptions.items()), task.description, task.oos_label)
        yield f"], {', '.join(map(json.dumps, rest))}]"
    yield "]"
