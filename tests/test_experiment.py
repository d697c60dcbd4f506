"""The evaluation chain on a tiny backbone: same episodes for every method, resumable cells, rows that agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from icl_markup import experiment as chain
from icl_markup.cells import Cell
from icl_markup.errors import ConfigError, EvaluationError
from icl_markup.experiment import load_experiment, run_experiment
from icl_markup.experiment_config import ExperimentConfig
from tests.conftest import TEXTS, tiny_backbone


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a backbone, a task of four labels with out-of-scope texts, a warm-up and an experiment."""
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    backbone = {"name": "model", "device": "cpu", "precision": "none"}
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{t} {split}", "label": label} for label, texts in TEXTS.items() for t in texts]
        rows += [] if split == "train" else [{"text": f"sing {i} {split}", "label": "oos"} for i in range(6)]
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task" / "meta.json").write_text(json.dumps({"oos_label": "oos"}))
    warmup = {
        "tasks": [{"path": "task", "name": name} for name in ("one", "two", "three")],
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1], "task_weights": {"one": 2}},
        "optimiser": {"steps": 2, "batch_tokens": 400, "window": 6},
        "validation_tasks": [{"path": "task", "name": "validation"}],
        "validation": {"episodes": 2, "n_way": 2, "every": 2},
    }
    (tmp_path / "warmup.yaml").write_text(yaml.safe_dump(warmup))
    experiment = {
        "experiment": "tiny",
        "backbone": backbone,
        "encoder": "model",
        "tasks": [{"path": "task"}],
        "selection_tasks": [{"path": "task", "name": "selection"}],
        "episodes": 6,
        "queries": 3,
        "output": "rows.jsonl",
        "settings": [
            {"n_way": 3, "k_shot": 1},
            {"n_way": 3, "k_shot": 1, "vary": "demo order", "variations": 3},
            {"n_way": None, "k_shot": 2, "open_world": True, "episodes": 2, "queries": 12,
             "retrieval": {"options": 2, "demos": 3}},
            {"n_way": None, "k_shot": 2, "episodes": 2, "queries": 6},
        ],
        "methods": [
            {"name": "chance"},
            {"name": "majority"},
            {"name": "label_names", "templates": ["plain_letters_multiple_choice"]},
            {"name": "plain", "templates": ["plain_letters_multiple_choice", "plain_letters_input_category"]},
            {"name": "plain", "calibration": "batch", "templates": ["plain_letters_multiple_choice"], "settings": [0]},
            {"name": "tags_untrained"},
            {"name": "tags", "warmup": "warmup.yaml", "seeds": [0, 1]},
            {"name": "tags", "label": "2 tasks", "warmup": "warmup.yaml", "overrides": {"most_tasks": 2},
             "settings": [0]},
            {"name": "tags", "label": "without <demo>", "warmup": "warmup.yaml", "without_tags": ["<demo>"],
             "settings": [0]},
            {"name": "lora", "warmup": "warmup.yaml", "settings": [0]},
            {"name": "embedding_knn"},
            {"name": "tfidf_logreg", "most_episodes": 2, "settings": [0]},
        ],
        "fast": {"episodes": 2, "output": "fast.jsonl", "warmup_overrides": {"optimiser.steps": 1}},
    }  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def test_every_method_gets_rows_and_a_second_run_measures_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_experiment("experiment.yaml")
    rows = run_experiment(config, "the command", progress=False)
    assert [json.loads(line) for line in (workplace / "rows.jsonl").read_text().splitlines()] == rows

    closed = of(rows, kind="measure", metric="accuracy", k_shot=1, vary=None)
    assert {row["method"] for row in closed} == {
        "chance", "majority", "label_names", "plain", "plain + batch calibration", "tags_untrained", "tags", "lora",
        "embedding_knn", "tfidf_logreg",
    }  # fmt: skip
    assert {row["template"] for row in of(closed, method="tags")} == {
        "seed 0", "seed 1", "mean", "2 tasks", "without <demo>",
    }  # fmt: skip
    assert {row["template"] for row in of(closed, method="plain")} >= {"mean", "best on validation"}
    (chance,) = of(closed, method="chance")
    assert chance["accuracy"] == pytest.approx(1 / 3, abs=1e-5)
    for row in rows:
        assert row["command"] == "the command"
        assert row["hardware"] and row["versions"]["torch"]
        if row["kind"] == "measure" and row["metric"] != "expected_calibration_error":
            assert row["low"] <= row["value"] <= row["high"]
    assert all(0 <= row["value"] <= 1 for row in of(rows, metric="expected_calibration_error"))
    assert of(rows, metric="right option offered, %", method="tags")
    plain = {r["template"]: r for r in of(closed, method="plain")}
    two = [plain[name]["accuracy"] for name in ("plain_letters_multiple_choice", "plain_letters_input_category")]
    assert plain["mean"]["accuracy"] == pytest.approx(np.mean(two), abs=2e-5)
    assert (plain["mean"]["minimum"], plain["mean"]["maximum"]) == (min(two), max(two))
    assert plain["best on validation"]["accuracy"] == plain[plain["best on validation"]["wording"]]["accuracy"]
    assert of(closed, method="tfidf_logreg")[0]["episodes"] == 2
    assert of(closed, method="lora")[0]["trainable_parameters"] > of(closed, method="tags")[0]["trainable_parameters"]

    opened = of(rows, open_world=True, method="tags", template="mean")
    assert {row["metric"] for row in opened if row["kind"] == "measure"} >= {"accuracy", "auroc", "oos_recall"}
    assert of(opened, metric="auroc")[0]["retrieval"] == "2 options, 3 demos"
    assert {row["over"] for row in of(rows, kind="spread")} == {"wording", "warm-up seed", "demo order"}
    assert of(rows, kind="comparison", against="plain (mean)")
    assert all(row["p_adjusted"] >= row["p_value"] for row in of(rows, kind="comparison"))
    assert of(rows, kind="curve", curve="roc") and of(rows, kind="curve", curve="risk_coverage", open_world=True)
    assert of(rows, kind="confusion", open_world=False) and not of(rows, kind="confusion", open_world=True)

    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(chain, "draw", refuse)
    assert run_experiment(config, "the command", progress=False) == rows


def test_tasks_are_pooled_with_the_calibration_that_validation_chooses(workplace: Path) -> None:
    wordings = ["plain_letters_multiple_choice", "plain_letters_input_category"]
    (workplace / "pooled.yaml").write_text(yaml.safe_dump({
        "experiment": "pooled",
        "backbone": {"name": "model", "device": "cpu", "precision": "none"},
        "tasks": [{"path": "task", "name": name} for name in ("one", "two")],
        "selection_tasks": [{"path": "task", "name": "selection"}],
        "selection_episodes": 2,
        "episodes": 4,
        "queries": 3,
        "output": "pooled.jsonl",
        "settings": [{"n_way": 3, "k_shot": 1}],
        "reference": "tags_untrained",
        "methods": [
            {"name": "chance"},
            *({"name": "plain", "calibration": one, "templates": wordings} for one in ("none", "contextual")),
            *({"name": "tags_untrained", "calibration": one} for one in ("none", "contextual")),
        ],
    }))  # fmt: skip
    rows = run_experiment(load_experiment("pooled.yaml"), "the command", progress=False)
    parts = of(rows, kind="measure", metric="accuracy")
    pooled = {(row["method"], row["template"]): row for row in of(parts, task="all 2 tasks")}
    chosen = " + calibration chosen on validation"
    assert set(pooled) == {
        ("plain", "mean"), ("plain + contextual calibration", "mean"), ("plain" + chosen, "mean"),
        ("plain" + chosen, "best on validation"), ("tags_untrained", "markup_letters"),
        ("tags_untrained + contextual calibration", "markup_letters"), ("tags_untrained" + chosen, "markup_letters"),
    }  # fmt: skip
    cells = [Cell.load(path) for path in (workplace / "runs" / "cells").iterdir()]
    chosen_on = [cell for cell in cells if cell.facts["task"] == "selection"]
    assert len(chosen_on) == 6
    assert all(int(cell.episodes.max()) == 1 for cell in chosen_on)
    suffix = {"none": "", "contextual": " + contextual calibration"}
    for (method, label), row in pooled.items():
        assert (row["episodes"], row["queries"]) == (8, 24)
        asked = method.replace(chosen, suffix[row.get("calibration", "none")])
        same = [one for one in of(parts, method=asked, template=row.get("wording", label)) if "pooled" not in one]
        assert len(same) == 2
        assert row["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in same]), abs=1e-5)
    against = {row["against"] for row in of(rows, kind="comparison", task="all 2 tasks")}
    assert against == {f"plain{chosen} (mean)", f"plain{chosen} (best on validation)"}


def test_an_interrupted_run_keeps_its_cells_and_ends_with_the_same_rows(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment(load_experiment("experiment.yaml", ["--cells", "whole"]), "c", progress=False)
    original, calls = Cell.save, []

    def fail_at_fifth(self: Cell, path: Path) -> None:
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, path)

    config = load_experiment("experiment.yaml", ["--cells", "parts"])
    monkeypatch.setattr(Cell, "save", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, "c", progress=False)
    monkeypatch.setattr(Cell, "save", original)
    assert len(list((workplace / "parts").glob("*.safetensors"))) == 4
    assert run_experiment(config, "c", progress=False) == whole


def test_fast_makes_the_listed_changes_and_the_command_line_wins(workplace: Path) -> None:
    fast = load_experiment("experiment.yaml", ["--queries", "2"], fast=True)
    assert (fast.episodes, fast.queries, fast.output) == (2, 2, "fast.jsonl")
    assert load_experiment("experiment.yaml").episodes == 6


def test_a_damaged_cell_is_an_error_that_names_it(workplace: Path) -> None:
    config = load_experiment("experiment.yaml", ["--methods", "[{name: majority}]", "--settings", "[{n_way: 2}]"])
    run_experiment(config, "c", progress=False)
    (path,) = (workplace / "runs" / "cells").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(EvaluationError, match=path.name):
        run_experiment(config, "c", progress=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "tags"}, "folders"),
        ({"name": "plain"}, "templates is empty"),
        ({"name": "plain", "templates": ["markup_letters"]}, "has tags"),
        ({"name": "tags_untrained", "templates": ["plain_letters_text_label"]}, "has no tags"),
        ({"name": "embedding_knn", "options": {"neighbours": 3}}, "neighbours"),
        ({"name": "lora", "warmup": "warmup.yaml", "overrides": {"rank": 3}}, "rank"),
        ({"name": "tags_untrained", "without_tags": ["<demos>"]}, "did you mean '<demo>'"),
    ],
)
def test_errors_name_the_method_and_the_remedy(workplace: Path, method: dict, message: str) -> None:
    tree = yaml.safe_load((workplace / "experiment.yaml").read_text())
    tree["methods"] = [method]
    (workplace / "wrong.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises((ConfigError, EvaluationError, ValueError), match=message):
        run_experiment(load_experiment("wrong.yaml"), "c", progress=False)


def test_a_setting_names_tasks_that_there_are(workplace: Path) -> None:
    settings = '[{n_way: 2, tasks: ["tasks"]}]'
    config = load_experiment("experiment.yaml", ["--methods", "[{name: majority}]", "--settings", settings])
    with pytest.raises(ConfigError, match=r"settings.0.tasks names 'tasks'.* did you mean 'task'"):
        run_experiment(config, "c", progress=False)
    assert not Path("rows.jsonl").exists()


def test_every_shipped_experiment_is_a_valid_configuration() -> None:
    folder = Path(__file__).resolve().parents[1] / "configs" / "experiments"
    for path in sorted(folder.glob("*.yaml")):
        for fast in (False, True):
            config = load_experiment(path, fast=fast)
            assert isinstance(config, ExperimentConfig)
            assert config.experiment == path.stem
