"""Experiments: methods × tasks × settings on the same episodes, as rows of results."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from icl_markup.backbone import Backbone
from icl_markup.errors import ConfigError
from icl_markup.evaluation import Estimate, answer_queries, chance, draw_episodes, estimate
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.readers import TaskSource, read_task
from icl_markup.results import result_row, write_rows
from icl_markup.tagfile import load_model, read_tags
from icl_markup.tasks import Task


@dataclass(frozen=True)
class MethodConfig:
    """A method to measure."""

    name: Literal["chance", "plain", "tags_untrained", "tags"]
    """chance; plain: prompts in plain words; tags_untrained: tags as they are initialised; tags: warmed-up tags."""

    templates: list[str] = field(default_factory=list)
    """For plain: names or paths of wordings. For tags_untrained: templates with tags (default: markup)."""

    folders: list[str] = field(default_factory=list)
    """For tags: tag folders, one a warm-up seed."""


@dataclass(frozen=True)
class Setting:
    """How hard the episodes are."""

    n_way: int | None = 5
    """Options an episode; null: every label."""

    k_shot: int = 1
    """Demonstrations a label."""


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment."""

    experiment: str
    """Its name in the rows of results."""

    tasks: list[TaskSource]
    """The tasks to measure on."""

    methods: list[MethodConfig]
    """The methods to compare."""

    settings: list[Setting] = field(default_factory=lambda: [Setting()])
    """The settings to measure in."""

    episodes: int = 500
    """Episodes a task and setting, the same for every method."""

    seed: int = 0
    """Seeds the episodes."""

    query_split: str = "test"
    """The split that queries come from."""

    output: str = "results/experiment.jsonl"
    """The file of rows; rows that are there already are not measured again."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen language model."""

    answers: Literal["symbols", "names"] = "symbols"
    """For plain and tags_untrained: read option symbols, or score whole label names; tags bring theirs along."""

    batch_tokens: int = 2048
    """The most tokens of one forward pass, padding included."""


@dataclass(frozen=True)
class Variant:
    """One thing to measure: a model under a method's name, with what tells it from the method's others."""

    method: str
    label: str
    model: MarkupModel | None
    weights: str = ""

    @property
    def identity(self) -> str | None:
        """Twelve digits that change with the backbone's weights, the tags and the template; None without a model."""
        if self.model is None:
            return None
        digest = hashlib.sha256(f"{self.weights} {self.model.template.source} {self.model.answers}".encode())
        if self.model.table is not None:
            digest.update(self.model.table.rows.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def parameters(self) -> int:
        """Trainable parameters of the method."""
        return self.model.table.rows.numel() if self.model and self.model.table is not None else 0


def run_experiment(config: ExperimentConfig, command: str, *, progress: bool = True) -> list[dict[str, Any]]:
    """Measure every cell that `config.output` does not hold yet, and append its rows.

    Args:
        config: the experiment.
        command: the command that makes the rows again; written into each of them.
        progress: show a progress bar over cells.

    Returns:
        All rows of the experiment, old and new: one for every variant, and one for the mean over a method's
        variants, whose `variant` is ``mean``.

    Raises:
        MarkupError: a task, backbone, template or tag folder cannot be used.
    """
    tasks = [read_task(source) for source in config.tasks]
    for task in tasks:
        for note in task.notes:
            print(f"{task.name}: {note}", file=sys.stderr)
    variants = list(_variants(config, Backbone.load(config.backbone)))
    output = Path(config.output)
    rows = _read_rows(output)
    done = {_key(row) for row in rows}
    cells = [(task, setting) for task in tasks for setting in config.settings]
    for task, setting in tqdm(cells, desc="cells", unit="cell", disable=not progress):
        measured = _measure_cell(config, task, setting, variants, done, command)
        new = [row for row in measured if _key(row) not in done]
        write_rows(output, new)
        rows += new
    return rows


def _measure_cell(
    config: ExperimentConfig, task: Task, setting: Setting, variants: list[Variant], done: set[str], command: str
) -> Iterator[dict[str, Any]]:
    def row(
        method: str, label: str, model: str | None, value: Estimate, parameters: int, **more: Any
    ) -> dict[str, Any]:
        return result_row(
            experiment=config.experiment,
            task=task.name,
            backbone=config.backbone.name,
            method=method,
            estimate=value,
            template=label,
            n_way=setting.n_way,
            k_shot=setting.k_shot,
            seed=config.seed,
            episodes=config.episodes,
            trainable_parameters=parameters,
            command=command,
            query_split=config.query_split,
            model=model,
            **more,
        )

    wanted = (row(v.method, v.label, v.identity, Estimate(0, 0, 0), 0) for v in variants)
    if all(_key(blank) in done for blank in wanted):
        return
    episodes = draw_episodes(
        task,
        n_way=setting.n_way,
        k_shot=setting.k_shot,
        episodes=config.episodes,
        seed=config.seed,
        query_split=config.query_split,
    )
    answers: dict[str, list[NDArray[np.bool_]]] = {}
    mean_options = round(float(np.mean([len(episode.options) for episode in episodes])), 2)
    for variant in variants:
        if variant.model is None:
            yield row(variant.method, variant.label, None, chance(episodes), 0, mean_options=mean_options)
            continue
        found = answer_queries(variant.model, episodes, config.batch_tokens)
        answers.setdefault(variant.method, []).append(found.correct)
        fit = {"shortened": found.shortened, "dropped": found.dropped, "mean_options": mean_options}
        value = estimate(found.correct)
        yield row(variant.method, variant.label, variant.identity, value, variant.parameters, **fit)
    for method, of_method in answers.items():
        if len(of_method) > 1:
            same = [variant for variant in variants if variant.method == method]
            identity = hashlib.sha256(" ".join(v.identity or "" for v in same).encode()).hexdigest()[:12]
            means = [float(correct.mean()) for correct in of_method]
            spread = {"minimum": round(min(means), 5), "maximum": round(max(means), 5), "variants": len(means)}
            value = estimate(np.stack(of_method))
            yield row(method, "mean", identity, value, same[0].parameters, mean_options=mean_options, **spread)


def _variants(config: ExperimentConfig, backbone: Backbone) -> Iterator[Variant]:
    weights = backbone.checksum()
    for method in config.methods:
        if method.name == "chance":
            yield Variant("chance", "none", None)
        elif method.name == "tags":
            if not method.folders:
                raise ConfigError("method tags: folders is empty; name the tag folders to measure")
            for folder in method.folders:
                seed = read_tags(folder).training.get("seed")
                label = f"{Path(folder).parent.name} (seed {seed})"
                yield Variant("tags", label, load_model(folder, backbone), weights)
        else:
            templates = method.templates or (["markup"] if method.name == "tags_untrained" else [])
            if not templates:
                raise ConfigError(f"method {method.name}: templates is empty; name the templates to measure")
            for template in templates:
                model = MarkupModel(backbone, template, answers=config.answers)
                if model.template.is_plain != (method.name == "plain"):
                    has = "has no" if model.template.is_plain else "has"
                    raise ConfigError(f"method {method.name}: template {template!r} {has} tags")
                yield Variant(method.name, Path(template).stem, model, weights)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not valid JSON ({error}); remove the line") from error
    return rows


def _key(row: dict[str, Any]) -> str:
    names = ("experiment", "task", "method", "template", "n_way", "k_shot", "seed", "episodes", "query_split", "model")
    return json.dumps([row.get(name) for name in names])
