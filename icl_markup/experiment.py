"""Experiments: methods × tasks × settings × seeds on the same episodes, cell by cell, into rows of results."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from icl_markup.backbone import Backbone
from icl_markup.cells import Cell, cell_name
from icl_markup.config import load_config
from icl_markup.drawing import draw, vary
from icl_markup.episodes import Episode
from icl_markup.errors import ConfigError, EvaluationError, nearest
from icl_markup.experiment_config import ExperimentConfig, Setting
from icl_markup.files import remove_leftovers, reported
from icl_markup.lock import only_run
from icl_markup.measured import Measured
from icl_markup.method import EpisodeScores, Method
from icl_markup.pooled import pooled_rows
from icl_markup.processes import Processes
from icl_markup.prompted import Prompted
from icl_markup.readers import TaskSource, read_task
from icl_markup.results import provenance, write_rows
from icl_markup.retrieval import Retrieved
from icl_markup.sentences import SentenceEncoder
from icl_markup.summary import corrected, summarise
from icl_markup.tasks import Task
from icl_markup.variants import Variant, variants

_GO_ON = "what was measured before is intact; make room or make it writable, then run the same command"
SELECTION = Setting(n_way=5, k_shot=1)
"""The setting in which the best of several wordings is chosen."""


def load_experiment(path: str | Path, overrides: Sequence[str] = (), *, fast: bool = False) -> ExperimentConfig:
    """Read an experiment's configuration; `fast` makes the changes that it lists under that key.

    Raises:
        ConfigError: it is malformed.
    """
    config = load_config(ExperimentConfig, path, overrides)
    if not fast:
        return config
    changes = [f"--{key}={json.dumps(value)}" for key, value in config.fast.items()]
    return load_config(ExperimentConfig, path, [*changes, *overrides])


def run_experiment(config: ExperimentConfig, command: str, *, progress: bool = True) -> list[dict[str, Any]]:
    """Measure every cell that is not there yet, and write the rows of all of them.

    While it runs, the rows so far are in a file beside the output whose name ends in ``.part``; a run that was stopped
    leaves earlier rows as they were, loses at most the cell it was in, and goes on with the next.

    The processes of `accelerate launch` share the episodes of each cell; the first alone writes.

    Args:
        config: the experiment.
        command: the command that makes the rows again; written into each of them.
        progress: show a progress bar over cells.

    Returns:
        All rows of the experiment, in every process.

    Raises:
        EvaluationError: another run is writing to `output`, a file cannot be written, or processes have other data or
            another backbone than the first; what was measured is intact.
        MarkupError: a task, backbone, template, tag folder or method cannot be used.
    """
    here = Processes.joined(on_cpu=config.backbone.device == "cpu")
    output = Path(config.output)
    with ExitStack() as opened:
        here.from_main(lambda: opened.enter_context(_opened(output, Path(config.cells))))
        return _run(config, command, output, progress and here.is_main, here)


@contextmanager
def _opened(output: Path, cells: Path) -> Iterator[None]:
    """Be the only run that writes to an output, with what earlier ones left cleared away."""
    with reported(EvaluationError, output, _GO_ON):
        output.parent.mkdir(parents=True, exist_ok=True)
    with only_run(output, EvaluationError):
        # Other experiments may be writing to the same folder of cells; what they write takes no hour.
        remove_leftovers(cells, older=3600)
        yield


def _run(config: ExperimentConfig, command: str, output: Path, progress: bool, here: Processes) -> list[dict[str, Any]]:
    tasks = _read(config.tasks)
    chain = _Chain(config, command, here)
    selected = chain.select(_read(config.selection_tasks), progress)
    for place, setting in enumerate(config.settings):
        for name in setting.tasks or []:
            if name not in {task.name for task in tasks}:
                known = [task.name for task in tasks]
                raise ConfigError(f"settings.{place}.tasks names {name!r}, which is no task here{nearest(name, known)}")
    plan = [(s, t) for s, t in product(config.settings, tasks) if s.tasks is None or t.name in s.tasks]
    total = sum(len(chain.wanted(setting)) for setting, _ in plan) * len(config.seeds)
    rows: list[dict[str, Any]] = []
    seen: list[Measured] = []
    part = output.with_name(output.name + ".part")
    with tqdm(total=total, desc="cells", unit="cell", disable=not progress) as bar:
        for setting, task in plan:
            measured = [one for seed in config.seeds for one in chain.measure(task, setting, seed, bar)]
            rows = here.from_main(partial(_so_far, part, rows, measured, selected, config, command))
            seen += measured
    for setting in config.settings:
        rows += here.from_main(
            partial(pooled_rows, [one for one in seen if one.setting is setting], selected, config, command)
        )
    rows = corrected(rows)
    here.from_main(partial(_finished, output, part, rows))
    return rows


def _so_far(
    part: Path,
    rows: list[dict[str, Any]],
    measured: Sequence[Measured],
    selected: dict[str, list[Cell]],
    config: ExperimentConfig,
    command: str,
) -> list[dict[str, Any]]:
    rows = corrected([*rows, *summarise(measured, selected, config, command)])
    with reported(EvaluationError, part, _GO_ON):
        write_rows(part, rows, replace=True)
    return rows


def _finished(output: Path, part: Path, rows: list[dict[str, Any]]) -> None:
    with reported(EvaluationError, output, _GO_ON):
        write_rows(output, rows, replace=True)
        part.unlink(missing_ok=True)


def _read(sources: Sequence[TaskSource]) -> list[Task]:
    tasks = [read_task(source) for source in sources]
    for task in tasks if Processes.here().is_main else []:
        for note in task.notes:
            print(f"{task.name}: {note}", file=sys.stderr)
    return tasks


class _Chain:
    def __init__(self, config: ExperimentConfig, command: str, here: Processes):
        self.here = here
        self.config = config
        self.command = command
        self.encoder = cache(lambda: SentenceEncoder(config.encoder))  # not loaded where nothing needs it
        self.backbone = Backbone.load(config.backbone)
        self.variants = list(variants(config, self.backbone, self.encoder))
        self.made: dict[str, Method] = {}
        self.threshold_task = read_task(config.threshold_task) if config.threshold_task else None

    def wanted(self, setting: Setting) -> list[Variant]:
        """Return the variants that are measured in a setting."""
        index = self.config.settings.index(setting)
        return [v for v in self.variants if v.config.settings is None or index in v.config.settings]

    def measure(self, task: Task, setting: Setting, seed: int, bar: tqdm[Any]) -> Iterator[Measured]:
        """Measure, or load, what every variant answers on the same episodes."""
        drawn: dict[str, list[Episode]] = {}
        self._expect(self.wanted(setting))
        for variant in self.wanted(setting):
            bar.set_postfix_str(f"{task.name}: {variant.method}", refresh=True)
            cell = self._cell(variant, task, setting, seed, self.config.query_split, drawn)
            validation = None
            if setting.open_world:
                source = task if "validation" in task.splits else self.threshold_task
                if source is not None:
                    validation = self._cell(variant, source, setting, seed + 1, "validation", drawn)
            yield Measured(variant, task, setting, seed, cell, validation)
            bar.update()

    def select(self, tasks: Sequence[Task], progress: bool) -> dict[str, list[Cell]]:
        """Measure on the selection tasks what is chosen there: wordings, and calibrations of any method."""
        among: dict[str, list[Variant]] = {}
        for variant in self.variants:
            among.setdefault(variant.base, []).append(variant)
        chosen = [
            variant
            for variants in among.values()
            for variant in variants
            if (variants[0].config.name == "plain" and len(variants) > 1)
            or len({one.config.calibration for one in variants}) > 1
        ]
        selected: dict[str, list[Cell]] = {}
        if not chosen:
            return selected
        setting = replace(SELECTION, episodes=self.config.selection_episodes)
        self._expect(chosen)
        for task in tqdm(tasks, desc="choosing wordings", unit="task", disable=None if progress else True):
            drawn: dict[str, list[Episode]] = {}
            for variant in chosen:
                cell = self._cell(variant, task, setting, 1, "train", drawn)
                selected.setdefault(variant.identity, []).append(cell)
        return selected

    def _expect(self, variants: Sequence[Variant]) -> None:
        """Say which calibrations are wanted, so that those of one model are asked for together."""
        methods = [method for method in (v.make() for v in variants if v.prompted) if isinstance(method, Prompted)]
        for method in methods:
            method.model.priors.clear()
        for method in methods:
            method.model.priors.add(method.prior)

    def _cell(
        self, variant: Variant, task: Task, setting: Setting, seed: int, split: str, drawn: dict[str, list[Episode]]
    ) -> Cell:
        config = self.config
        count = setting.episodes or config.episodes
        if variant.config.most_episodes is not None:
            count = min(count, variant.config.most_episodes)
        queries = setting.queries or config.queries
        place = {
            "seed": seed,
            "split": split,
            "episodes": count,
            "queries": queries,
            "setting": _measured_as(setting),
        }
        retrieval = setting.retrieval if variant.prompted else None
        name = cell_name(task=_digest(task), variant=variant.identity, encoder=config.encoder, **place)
        path = Path(config.cells) / name
        found = self._kept(path)
        if found is not None:
            return found
        if split not in drawn:
            everyone = setting.episodes or config.episodes
            drawn[split] = draw(task, setting, episodes=everyone, queries=queries, seed=seed, query_split=split)
        episodes = drawn[split][:count]
        if variant.identity not in self.made:
            self.made[variant.identity] = variant.make()
        method = self.made[variant.identity]
        if retrieval is not None:
            method = Retrieved(method, self.encoder(), retrieval)
        variations = 1 if setting.vary == "nothing" else setting.variations
        answered = []
        for variation in range(variations):
            asked = [vary(e, setting, variation, task, seed) for e in episodes] if variations > 1 else episodes
            answered.append((asked, self._scores(variant, method, asked)))
        facts = {
            "task": task.name,
            "open_world": setting.open_world,
            "trainable_parameters": variant.parameters,
            "command": self.command,
            **provenance(),
        }
        cell = Cell.of(answered, facts)
        self.here.from_main(lambda: _save(cell, path))
        return cell

    def _kept(self, path: Path) -> Cell | None:
        """Return a cell that the first process finds measured, once all have agreed that they mean the same one."""
        first = self.here.is_main
        found = self.here.together(lambda: (path.name, Cell.load(path) if first and path.exists() else None))
        for index, (name, _) in enumerate(found):
            if name != found[0][0]:
                raise EvaluationError(
                    f"process {index} would measure something else than the first: its data, its backbone or its tags "
                    "differ; give all machines the same files"
                )
        return found[0][1]

    def _scores(self, variant: Variant, method: Method, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode, each process a part of them.

        A backbone that is split over processes scores all of them in each: where one computes, all must.
        """
        if variant.prompted and self.backbone.is_sharded:
            return self.here.together(lambda: method.scores(episodes))[0]
        return [one for part in self.here.share(episodes, method.scores) for one in part]


def _save(cell: Cell, path: Path) -> None:
    with reported(EvaluationError, path, _GO_ON):
        cell.save(path)


def _measured_as(setting: Setting) -> dict[str, Any]:
    """Return what of a setting answers depend on: not the tasks it is measured on, nor an expert that is the default,
    so that cells measured before there was a choice are found again."""
    place = {key: value for key, value in asdict(setting).items() if key != "tasks"}
    if setting.retrieval is not None and setting.retrieval.expert == "similarity":
        del place["retrieval"]["expert"]
    return place


def _digest(task: Task) -> str:
    digest = hashlib.sha256(repr((task.name, task.labels, sorted(task.descriptions.items()))).encode())
    for split in sorted(task.splits):
        # As the list of all pairs is written, without holding it.
        digest.update(b"[")
        for i, example in enumerate(task.splits[split]):
            digest.update(f"{', ' if i else ''}{(example.text, example.label)!r}".encode())
        digest.update(b"]")
    return digest.hexdigest()[:16]
