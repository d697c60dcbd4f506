"""The quickstart: tags warmed up on sample tasks, measured on sample tasks that they never saw.

A minute of training is too short for tags that begin with words. So the quickstart begins with the tags that ship with
the package, if there are any for its backbone, and trains them further.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from icl_markup.config import load_config
from icl_markup.embedded import quickstart_config, sample_folders
from icl_markup.episodes import Episode
from icl_markup.errors import WarmupError
from icl_markup.evaluation import Estimate, answer_queries, chance, draw_episodes, estimate
from icl_markup.model import MarkupModel
from icl_markup.readers import TaskSource, read_task
from icl_markup.results import result_row, write_rows
from icl_markup.run_folder import METRICS
from icl_markup.tasks import Task
from icl_markup.template import shipped_templates
from icl_markup.warmup import WarmupResult, run_warmup
from icl_markup.warmup_config import WarmupConfig
from icl_markup.zoo import zoo_folder

N_WAY, K_SHOT, QUERIES = 5, 1, 5

WORDINGS = 6
"""Wordings that are measured, of those in the package: each costs as much as the tags."""


def run_quickstart(
    folder: Path, *, episodes: int = 4, overrides: tuple[str, ...] = (), rows: Path | None = None
) -> None:
    """Warm tags up, compare them with plain words, and say how to use them.

    Args:
        folder: where the run goes; an earlier quickstart there is replaced.
        episodes: episodes of five queries an unseen task.
        overrides: changes to the warm-up's configuration, as on the command line.
        rows: a JSONL file to append the table's rows to.

    Raises:
        MarkupError: the backbone is missing, or `folder` cannot be written.
    """
    console = Console(width=None if Console().is_terminal else 110)
    began = time.monotonic()
    config = _config(folder, overrides)
    console.print(
        f"Warming up tags for [bold]{escape(config.backbone.name)}[/] on {len(config.tasks)} sample tasks; the "
        "language model stays frozen."
    )
    for name in config.start_from:
        console.print(
            f"A minute is too short to begin from nothing: they begin as the tags {name!r} of the package, which were "
            "warmed up on other tasks, and are trained further."
        )
    _clear(folder)
    result = run_warmup(config)
    _say_what_was_learned(console, result.folder.parent / METRICS)
    methods = _methods(result.model)
    tasks = [read_task(path) for path in sample_folders("unseen")]
    console.print(
        f"\nMeasuring on {len(tasks)} unseen tasks, {episodes} episodes of {QUERIES} texts each: {N_WAY} options, "
        f"{K_SHOT} demonstration a label. "
        "Each method is calibrated as it is by default (for answers in words: contextual calibration)."
    )
    measured = [_measure(task, methods, episodes) for task in tqdm(tasks, desc="unseen tasks", unit="task")]
    console.print(_table(measured, len(methods["plain"])))
    if rows is not None:
        write_rows(rows, [row for m in measured for row in _rows(m, methods, config, episodes)])
    _say_how_to_go_on(console, result, time.monotonic() - began)


@dataclass(frozen=True)
class _Measured:
    """One task's answers: which were right, by method, of shape (variants x queries, episodes)."""

    task: str
    guess: float
    correct: dict[str, NDArray[np.bool_]]


def _config(folder: Path, overrides: tuple[str, ...]) -> WarmupConfig:
    config = load_config(WarmupConfig, quickstart_config(), ["--output", str(folder), *overrides])
    validating = {source.path for source in config.validation_tasks}
    sources = {path.name: TaskSource(str(path)) for path in sample_folders("warmup")}
    shipped = [config.backbone.name] if zoo_folder(config.backbone.name) else []
    return replace(
        config,
        start_from=config.start_from or shipped,
        tasks=[source for name, source in sources.items() if name not in validating],
        validation_tasks=[source for name, source in sources.items() if name in validating],
    )


def _methods(model: MarkupModel) -> dict[str, list[MarkupModel]]:
    answers = model.answers
    wordings = shipped_templates("plain_words" if answers == "names" else "plain_letters")
    wordings = wordings[:: max(1, len(wordings) // WORDINGS)][:WORDINGS]
    return {
        "plain": [MarkupModel(model.backbone, name, answers=answers) for name in wordings],
        "tags_untrained": [MarkupModel(model.backbone, model.template, answers=answers)],
        "tags": [model],
    }


def _measure(task: Task, methods: dict[str, list[MarkupModel]], episodes: int) -> _Measured:
    drawn = draw_episodes(task, n_way=N_WAY, k_shot=K_SHOT, episodes=episodes, seed=0, queries=QUERIES)
    correct = {
        name: np.concatenate([_answered(m, drawn).reshape(episodes, QUERIES).T for m in models])
        for name, models in methods.items()
    }
    return _Measured(task.name, chance(drawn).mean, correct)


def _answered(model: MarkupModel, episodes: Sequence[Episode]) -> NDArray[np.bool_]:
    """Return which queries a model answers rightly, calibrated as it is if nobody says otherwise."""
    return answer_queries(model, episodes, prior=model.prior).correct


def _table(measured: list[_Measured], wordings: int) -> Table:
    table = Table(title="Accuracy on unseen tasks, % (95 % interval)")
    table.add_column("task")
    for heading in ("chance", f"plain words, mean of {wordings}", "from – to", "untrained tags", "warmed-up tags"):
        table.add_column(heading, justify="right")
    for one in measured:
        table.add_row(*_cells(one))
    table.add_section()
    joined = {name: np.concatenate([m.correct[name] for m in measured], axis=1) for name in measured[0].correct}
    table.add_row(*_cells(_Measured("all", float(np.mean([m.guess for m in measured])), joined)), style="bold")
    return table


def _cells(one: _Measured) -> list[str]:
    wordings = one.correct["plain"].reshape(-1, QUERIES, one.correct["plain"].shape[1]).mean(axis=(1, 2))
    return [
        one.task,
        f"{100 * one.guess:.1f}",
        _percent(one.correct["plain"]),
        f"{100 * wordings.min():.1f} – {100 * wordings.max():.1f}",
        _percent(one.correct["tags_untrained"]),
        _percent(one.correct["tags"]),
    ]


def _percent(correct: NDArray[np.bool_]) -> str:
    value = estimate(correct)
    return f"{100 * value.mean:.1f} ({100 * value.low:.1f}–{100 * value.high:.1f})"


def _rows(
    one: _Measured, methods: dict[str, list[MarkupModel]], config: WarmupConfig, episodes: int
) -> Iterator[dict[str, Any]]:
    estimates = {"chance": Estimate(one.guess, one.guess, one.guess)}
    estimates |= {name: estimate(correct) for name, correct in one.correct.items()}
    for name, value in estimates.items():
        table = methods[name][0].table if name in methods else None
        yield result_row(
            experiment="quickstart",
            task=one.task,
            backbone=config.backbone.name,
            method=name,
            estimate=value,
            template={"chance": "none", "plain": "mean"}.get(name, methods["tags"][0].template.name),
            n_way=N_WAY,
            k_shot=K_SHOT,
            seed=config.seed,
            episodes=episodes,
            trainable_parameters=0 if table is None else table.rows.numel(),
            command=f"icl-markup quickstart --episodes {episodes} --steps {config.optimiser.steps}",
        )


def _say_what_was_learned(console: Console, metrics: Path) -> None:
    """Say how the loss fell: the mean over the first third of the steps, and over the last."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    part = max(1, len(losses) // 3)
    first, last = float(np.mean(losses[:part])), float(np.mean(losses[-part:]))
    console.print(f"Training loss: {first:.2f} in the first {part} steps, {last:.2f} in the last {part}.")


def _say_how_to_go_on(console: Console, result: WarmupResult, seconds: float) -> None:
    table = result.model.table
    assert table is not None
    size = (result.folder / "tags.safetensors").stat().st_size
    console.print(
        f"\nThe tags are in [bold]{escape(str(result.folder))}[/]: "
        f"tags.safetensors has {size:,} bytes, "
        f"{table.rows.numel():,} parameters.\nAll of it took {seconds:.0f} seconds. "
        "Now classify a sentence of your own:\n"
    )
    program = Path(sys.argv[0])
    shown = os.path.relpath(program) if program.name == "icl-markup" and program.is_file() else "icl-markup"
    print(
        f'{shown} predict --tags {result.folder} --labels "lost card" "opening hours" complaint '
        '-- "When do you close on Sundays?"'
    )


def _clear(folder: Path) -> None:
    """Remove the run of an earlier quickstart, which is known by a marker; any other run stays.

    Raises:
        WarmupError: the folder holds another run.
    """
    marker = folder / "quickstart"
    if (folder / "config.yaml").exists() and not marker.exists():
        raise WarmupError(f"{folder}: holds a run that is no quickstart; choose another --output")
    for name in ("checkpoint.safetensors", "metrics.jsonl", "config.yaml"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
