"""Warm-up: meta-trains the tags on episodes of many tasks, with everything else frozen."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from icl_markup.backbone import Backbone
from icl_markup.checkpoint import Progress, has_checkpoint, load_checkpoint, save_checkpoint
from icl_markup.config import to_dict
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.errors import Interrupted, WarmupError
from icl_markup.evaluation import answer_together
from icl_markup.files import append_line
from icl_markup.lock import only_run
from icl_markup.model import MarkupModel
from icl_markup.optimisation import Launched, TagOptimiser
from icl_markup.preparation import prepared
from icl_markup.priors import Prior
from icl_markup.processes import Processes
from icl_markup.quantisation import check_gradients
from icl_markup.readers import read_task, without_storage
from icl_markup.run_folder import METRICS, open_output, writing
from icl_markup.start import Start
from icl_markup.stream import Position, PromptStream, Step
from icl_markup.tagfile import tags_of, write_tags
from icl_markup.tags import tags_in_vocabulary
from icl_markup.tasks import Task
from icl_markup.warmup_config import OptimiserConfig, ValidationConfig, WarmupConfig

__all__ = ["OptimiserConfig", "ValidationConfig", "WarmupConfig", "WarmupResult", "run_warmup"]


@dataclass(frozen=True)
class WarmupResult:
    """What a warm-up made: the model with its best tags, where they are, and the summary on their card."""

    model: MarkupModel
    folder: Path
    summary: dict[str, Any]


def run_warmup(
    config: WarmupConfig,
    *,
    tasks: Sequence[Task] | None = None,
    validation_tasks: Sequence[Task] | None = None,
    backbone: Backbone | None = None,
    progress: bool = True,
) -> WarmupResult:
    """Warm tags up and save the best.

    Args:
        config: everything about the run.
        tasks: tasks already read, instead of `config.tasks`.
        validation_tasks: the same for `config.validation_tasks`.
        backbone: a backbone already loaded, instead of `config.backbone`.
        progress: show a progress bar.

    Returns:
        The model with its best tags, saved in ``OUTPUT/tags``.

    Raises:
        WarmupError: `output` holds another run or is another's at the moment, it cannot be written, the loss is not
            finite, or the backbone was changed; what was saved before is intact.
        Interrupted: the process got a SIGINT (Ctrl-C); the step was finished and saved.
        MarkupError: the backbone, the template or a task cannot be used.
    """
    on_cpu = backbone.device.type == "cpu" if backbone else config.backbone.device == "cpu"
    Processes.joined(on_cpu=on_cpu)  # gives this process its device, on which the backbone is then loaded
    backbone = backbone or Backbone.load(config.backbone)
    accelerator = Accelerator(
        # Autocast is the backbone's; of accelerate's mixed precision only the loss scaling of fp16 is wanted.
        mixed_precision="fp16" if backbone.precision == "fp16" else "no",
        cpu=backbone.device.type == "cpu",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
    )
    set_seed(config.seed)
    tasks = tasks if tasks is not None else [read_task(source) for source in config.tasks]
    if config.most_tasks is not None:
        tasks = random.Random(config.seed).sample(list(tasks), min(config.most_tasks, len(tasks)))
    validation_tasks = (
        validation_tasks if validation_tasks is not None else [read_task(s) for s in config.validation_tasks]
    )
    start = Start.of(config, backbone)
    return _Warmup(config, start.model(config, backbone), start, tasks, validation_tasks, accelerator, progress).run()


class _Warmup:
    def __init__(
        self,
        config: WarmupConfig,
        model: MarkupModel,
        start: Start,
        tasks: Sequence[Task],
        validation_tasks: Sequence[Task],
        accelerator: Accelerator,
        progress: bool,
    ):
        assert model.table is not None
        self.config = config
        self.model = model
        self.table = model.table
        self.start = start
        self.kept = self.table.frozen.clone()
        self.accelerator = accelerator
        self.here = Processes.here()
        self.show_progress = progress and accelerator.is_main_process
        self.out = Path(config.output)
        self.task_names = [task.name for task in tasks]
        self.notes = [f"{task.name}: {note}" for task in [*tasks, *validation_tasks] for note in task.notes]
        self.validation_tasks = validation_tasks
        plan = config.optimiser
        self.stream = PromptStream(
            model.markup,
            EpisodeSampler(tasks, for_tasks(config.episodes, tasks, config.most_tasks), config.seed),
            window=plan.window,
            batch_tokens=plan.batch_tokens,
            batches_per_step=plan.batches_per_step,
            workers=(0 if accelerator.device.type == "cpu" else 2) if config.workers is None else config.workers,
            tokens=model.tokens_of,
        )
        self.scale = _embedding_deviation(model.backbone)
        rate = plan.learning_rate * self.scale
        self.optimiser = TagOptimiser(model, plan, rate, config.supervise == "all", accelerator)
        self.progress = Progress()
        self.best = self.table.rows.detach().clone()
        self._launched: Launched | None = None
        self._settled = 0
        self._interrupts: list[int] = []
        self._told_to_stop = False
        self._unwritten: WarmupError | None = None

    def run(self) -> WarmupResult:
        """Train and save, alone in the output folder; of several processes only the main one writes there."""
        _check_trainable(self.model)
        with ExitStack() as held:
            self.here.from_main(lambda: held.enter_context(only_run(self.out, WarmupError, folder=True)))
            return self._run()

    def _run(self) -> WarmupResult:
        checksum = self.model.backbone.checksum()
        self.here.together(self._go_on)
        self.here.from_main(lambda: open_output(self.out, self.config, self.progress.step))
        if self.config.tracker != "none":
            self.accelerator.init_trackers("icl-markup", to_dict(self.config))
        try:
            with prepared(self.model.backbone):
                self._train()
            if self.model.backbone.checksum() != checksum:
                raise WarmupError("the backbone's weights changed during the warm-up; the tags were not saved")
            if not torch.equal(self.table.frozen, self.kept):
                raise WarmupError("frozen tags changed during the warm-up; the tags were not saved")
            summary = {**self._summary(), **self._calibration()}
            self._save_best(summary)
            self.table.freeze(())
            self.accelerator.wait_for_everyone()
        finally:
            # Not `end_training`: it would end the group of processes, too, which an evaluation still needs.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return WarmupResult(self.model, self.out / "tags", summary)

    def _go_on(self) -> None:
        """Go on from the checkpoint in the output folder, if it holds one."""
        comparable = self._comparable()
        if has_checkpoint(self.out):
            if not self.config.resume:
                raise WarmupError(
                    f"{self.out}: holds a run already; resume it (--resume true) or choose another output"
                )
            rows, best, self.progress, before = load_checkpoint(self.out, self.optimiser.raw)
            # What an earlier version did not know it did as by default.
            before = {**_comparable(WarmupConfig(tasks=[])), **before}
            changed = next((k for k in comparable if comparable[k] != before.get(k)), None)
            if changed:
                raise WarmupError(
                    f"{self.out}: was started with another {changed} ({before.get(changed)!r}); resume it as it was, "
                    "or choose another output"
                )
            if rows.shape != self.table.rows.shape:
                raise WarmupError(f"{self.out}: its tags have shape {tuple(rows.shape)}; the template was changed")
            with torch.no_grad():
                self.table.rows.copy_(rows)
            self.best = best.to(self.table.rows.device)
            self.optimiser.restore(self.progress.schedule, self.progress.loss_scale)

    def _train(self) -> None:
        plan, state = self.config.optimiser, self.progress
        if state.finished:
            return
        processes = self.accelerator.num_processes
        if plan.batches_per_step % processes:
            raise WarmupError(
                f"optimiser.batches_per_step is {plan.batches_per_step}, no multiple of the {processes} processes; "
                "give a multiple, or warm up in one process first"
            )
        if state.step == 0:
            self._validate()
        self._settled = state.step
        hidden = not self.show_progress
        with (
            _interrupt_noted() as self._interrupts,
            tqdm(total=plan.steps, initial=state.step, desc="warm-up", unit="step", disable=hidden) as self._bar,
        ):
            for step in self.stream.steps(Position(state.window, state.batch)):
                if state.step >= plan.steps or self._out_of_patience():
                    break
                launched = self._step(step)
                self._settle()  # the step before, while this one is at work
                self._launched = launched
                state.step += 1
                state.window, state.batch = step.after
                last = state.step == plan.steps
                stop = self._told_to_stop or (self.accelerator.num_processes == 1 and bool(self._interrupts))
                validate = state.step % self.config.validation.every == 0 or last
                save = state.step % self.config.save_every == 0 or last or stop
                if validate or save:
                    self._settle()
                if validate:
                    self._validate()
                if save:
                    self._save()
                if stop:
                    self._save_best({**self._summary(), "stopped": f"at step {state.step} of {plan.steps}"})
                    self.accelerator.wait_for_everyone()  # a launcher ends the others where one has ended
                    raise Interrupted(f"interrupted; {self.out} holds step {state.step}; resume it (--resume true)")
        state.finished = True
        self._save()

    def _step(self, step: Step) -> Launched:
        return self.optimiser.launch(step, bool(self._interrupts) or self._unwritten is not None)

    def _settle(self) -> None:
        """Read what the step before came to, and write it down."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        state, number = self.progress, self._settled + 1
        found = launched.read()
        if found.defect:
            self._fail_on(found.defect, number)
        self._settled = number
        self._told_to_stop = found.stop
        state.tokens += found.tokens
        state.positions += found.positions
        if not self.validation_tasks:
            self.best, state.best_step = launched.rows, number
        self._log({"step": number, **found.metrics})
        shown = {"loss": f"{found.metrics['loss']:.3f}"}
        if self.validation_tasks:
            shown["best"] = f"{state.best_accuracy:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def _save_best(self, summary: dict[str, Any]) -> None:
        with torch.no_grad():
            self.table.rows.copy_(self.best)
        self.model.origin = tags_of(self.model, summary, self.start.ancestry)
        origin = self.model.origin
        self.here.from_main(lambda: write_tags(origin, self.out / "tags"))

    def _fail_on(self, defect: str, step: int) -> None:
        self.progress.step = step - 1  # what came after it is worth nothing
        self._save_best(self._summary())
        raise WarmupError(
            f"the {defect} at step {step}; the tags of step {self.progress.best_step} are in {self.out / 'tags'}; "
            "lower optimiser.learning_rate or use fp32"
        )

    def _validate(self) -> None:
        if not self.validation_tasks:
            return
        state = self.progress
        accuracy, loss = self._validated("none")
        mean, mean_loss = sum(accuracy) / len(accuracy), sum(loss) / len(loss)
        by_task = {f"validation_{t.name}": a for t, a in zip(self.validation_tasks, accuracy, strict=True)}
        self._log({"step": state.step, "validation_accuracy": mean, "validation_loss": mean_loss, **by_task})
        if (mean, -mean_loss) > (state.best_accuracy, -state.best_loss):
            state.best_accuracy, state.best_loss, state.best_step = mean, mean_loss, state.step
            state.stale = 0
            self.best = self.table.rows.detach().clone()
        else:
            state.stale += 1

    def _validated(self, prior: Prior) -> tuple[list[float], list[float]]:
        """Return accuracy and loss on each validation task, with a prior divided out."""
        plan = self.config.validation
        accuracy, loss = [], []
        for task in self.validation_tasks:
            sampler = EpisodeSampler([task], plan.episode_config, seed=self.config.seed)
            drawn = [sampler.episode(0, i) for i in range(plan.episodes)]
            answers = answer_together(self.model, drawn, self.config.optimiser.batch_tokens, prior)
            accuracy.append(float(answers.correct.mean()))
            loss.append(float(answers.loss.mean()))
        return accuracy, loss

    def _calibration(self) -> dict[str, Any]:
        """Take the best tags, and return whether they answer validation tasks better with contextual calibration."""
        if not self.validation_tasks:
            return {}
        with torch.no_grad():
            self.table.rows.copy_(self.best)
        accuracy, _ = self._validated("contextual")
        mean = sum(accuracy) / len(accuracy)
        better = mean > self.progress.best_accuracy
        return {
            "calibration": "contextual" if better else "none",
            "validation accuracy with contextual calibration": mean,
        }

    def _out_of_patience(self) -> bool:
        patience = self.config.validation.patience
        return patience is not None and self.progress.stale >= patience

    def _log(self, metrics: dict[str, Any]) -> None:
        if not self.here.is_main or self._unwritten is not None:
            return
        try:
            with writing(self.out):
                append_line(self.out / METRICS, json.dumps(metrics))
        except WarmupError as error:
            if self.here.count == 1:
                raise
            self._unwritten = error  # the other processes are told with the next step, and all end where they save
            return
        if self.config.tracker != "none":
            self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def _save(self) -> None:
        self.progress.schedule, self.progress.loss_scale = self.optimiser.state()
        self.here.from_main(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        if self._unwritten is not None:
            raise self._unwritten
        with writing(self.out):
            save_checkpoint(self.out, self.table.rows, self.best, self.optimiser.raw, self.progress, self._comparable())

    def _comparable(self) -> dict[str, Any]:
        """Return what must not change when the run is resumed; where it began with tags, these are part of it."""
        found = _comparable(self.config)
        return {**found, "start_from": list(self.start.checksums)} if self.start.checksums else found

    def _summary(self) -> dict[str, Any]:
        state = self.progress
        summary: dict[str, Any] = {
            "tasks": self.task_names,
            "validation tasks": [task.name for task in self.validation_tasks],
            "template": Path(self.model.template.name).stem,
            "answers": self.model.answers,
            "steps": state.step,
            "tokens": state.tokens,
            "best step": state.best_step,
            "learning rate": self.config.optimiser.learning_rate * self.scale,
            "precision": self.model.backbone.precision,
            "quantisation": self.model.backbone.quantisation,
            "padding": round(1 - state.tokens / state.positions, 4) if state.positions else 0.0,
            "seed": self.config.seed,
            **self.start.summary(),
        }
        if self.validation_tasks:
            summary["validation accuracy"] = state.best_accuracy
        if self.notes:
            summary["notes on the data"] = self.notes
        known = tags_in_vocabulary(self.model.template.tags, self.model.backbone.tokenizer.get_vocab())
        if known:
            summary["tags whose names are also tokens of the tokenizer"] = [tag.name for tag in known]
        return summary


@contextmanager
def _interrupt_noted() -> Iterator[list[int]]:
    """Note Ctrl-C in the list yielded instead of raising it, so that a step is never cut in two; the second raises."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _embedding_deviation(backbone: Backbone) -> float:
    ids = backbone.vocabulary
    with torch.no_grad():
        sample = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 8192)).long().to(ids.device)]
        return float(backbone.embedding(sample).float().std(0).mean())


def _check_trainable(model: MarkupModel) -> None:
    backbone = model.backbone
    trainable = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    if trainable:
        raise WarmupError(f"{trainable[0]} of the backbone requires a gradient; only tags may")
    if backbone.quantisation == "none":
        return
    dtype = next(backbone.embedding.parameters()).dtype
    if dtype == torch.float16:
        raise WarmupError("fp16 trains with loss scaling, under autocast, which a quantised backbone does not take; "
                          "set backbone.dtype to bf16 or fp32")  # fmt: skip
    check_gradients(backbone.model, dtype)


def for_tasks(episodes: EpisodeConfig, tasks: Sequence[Task], most: int | None) -> EpisodeConfig:
    """Leave out the weights of tasks that were not chosen; where all are used, an unknown name stays an error."""
    if most is None:
        return episodes
    names = {task.name for task in tasks}
    return replace(episodes, task_weights={n: w for n, w in episodes.task_weights.items() if n in names})


def _comparable(config: WarmupConfig) -> dict[str, Any]:
    """Return what of a configuration must not change when a run is resumed."""
    return without_storage(
        to_dict(replace(config, resume=False, output="", tracker="none", save_every=1, workers=None))
    )
