"""Two processes on CPUs do what one does: every episode once, the same answers and tags, with layers split as well."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from icl_markup import cli, processes
from icl_markup.cells import Cell
from icl_markup.errors import MarkupError
from icl_markup.evaluation import answer_queries
from icl_markup.experiment import load_experiment, run_experiment
from icl_markup.fingerprint import Fingerprint
from icl_markup.model import MarkupModel
from icl_markup.processes import Processes
from tests.conftest import TEXTS, tiny_backbone
from tests.in_processes import EPISODES, KINDS, warmed_up

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
BY = {"split": (), "offloaded": ("--fsdp_offload_params", "true")}
"""What more accelerate is told where a backbone is split, by the folder of its runs."""


def launch(folder: Path, what: str, config: str, *more: str, count: int = 2) -> list[dict[str, Any]]:
    """Run tests/in_processes.py in some processes as a configuration of ours says, which works on CPUs, too."""
    command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--num_processes", str(count)]
    command += more
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "tests.in_processes", what, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
        timeout=600,
    )
    (folder / f"{what}.out").write_text(done.stdout)
    (folder / f"{what}.err").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{what}-{index}.json").read_text()) for index in range(count)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbones, a task and an experiment, which one process has measured into rows1.jsonl and cells1."""
    folder = tmp_path_factory.mktemp("processes")
    for name in KINDS:
        model = tiny_backbone(name).model
        tokenizer = copy.deepcopy(tiny_backbone(name).tokenizer)  # the tests share it
        tokenizer.model_max_length = 256
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "task").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{t} {split}", "label": label} for label, texts in TEXTS.items() for t in texts]
        rows += [] if split == "train" else [{"text": f"sing {i} {split}", "label": "oos"} for i in range(6)]
        (folder / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task" / "meta.json").write_text(json.dumps({"oos_label": "oos"}))
    warmup = {
        "tasks": [{"path": "task", "name": name} for name in ("one", "two")],
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1]},
        "optimiser": {"steps": 2, "batch_tokens": 300, "window": 12, "batches_per_step": 2},
    }
    (folder / "warmup.yaml").write_text(yaml.safe_dump(warmup))
    experiment = {
        "experiment": "tiny",
        "backbone": {"name": "bert", "device": "cpu", "precision": "none"},
        "encoder": "bert",
        "tasks": [{"path": "task"}],
        "selection_tasks": [{"path": "task", "name": "selection"}],
        "episodes": 5,
        "queries": 3,
        "runs": "runs2",
        "cells": "cells2",
        "output": "rows2.jsonl",
        "settings": [
            {"n_way": 3, "k_shot": 1, "vary": "option order", "variations": 2},
            {"n_way": None, "k_shot": 2, "open_world": True, "episodes": 1, "queries": 6,
             "retrieval": {"options": 2, "demos": 3}},
        ],
        "methods": [
            {"name": "majority"},
            {"name": "plain", "templates": ["plain_letters_multiple_choice", "plain_letters_input_category"]},
            {"name": "plain", "calibration": "batch", "templates": ["plain_letters_multiple_choice"]},
            {"name": "tags", "warmup": "warmup.yaml", "settings": [0]},
            {"name": "tags", "label": "odd", "warmup": "warmup.yaml", "settings": [0],
             "overrides": {"optimiser.batches_per_step": 1}},
            {"name": "lora", "warmup": "warmup.yaml", "settings": [0]},
            {"name": "embedding_knn"},
        ],
    }  # fmt: skip
    (folder / "two.yaml").write_text(yaml.safe_dump(experiment))
    before = Path.cwd()
    os.chdir(folder)
    try:
        one = ["--cells", "cells1", "--runs", "runs1", "--output", "rows1.jsonl"]
        run_experiment(load_experiment("two.yaml", one), "icl-markup evaluate two.yaml", progress=False)
        # The warm-up with one batch a step is finished when two processes come to it, which could not share it.
        (odd,) = [path for path in Path("runs1").glob("tags-*") if "batches_per_step: 1" in _read(path)]
        Path("runs2").mkdir()
        odd.rename(Path("runs2") / odd.name)
    finally:
        os.chdir(before)
    return folder


def _read(run: Path) -> str:
    return (run / "config.yaml").read_text()


@pytest.fixture(scope="module")
def shared(workplace: Path) -> list[dict[str, Any]]:
    """What two processes found that each hold the whole backbone."""
    return launch(workplace, "shared", "multi_gpu.yaml")


@pytest.fixture(scope="module", params=BY)
def by(request: pytest.FixtureRequest) -> str:
    """What splits a backbone."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def split(workplace: Path, by: str) -> list[dict[str, Any]]:
    """What two processes found that split a backbone's layers."""
    return launch(workplace, by, "fsdp2.yaml", *BY[by])


def test_alone_there_is_one_process_that_does_everything() -> None:
    here = Processes.joined(on_cpu=True)
    assert (here, here.is_main) == (Processes(0, 1), True)
    assert here.share([3, 1, 2], list) == [[3, 1, 2]]
    assert here.share([], list) == [[]]
    assert here.from_main(lambda: "found") == "found"
    with pytest.raises(KeyError):
        here.together(lambda: {}["missing"])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 4, 7, 10])
def test_every_item_is_one_process_s(size: int, count: int) -> None:
    items = list(range(size))
    parts = [Processes(index, count).part(items) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_processes_share_comes_together_in_order_and_each_item_once(shared: list[dict[str, Any]]) -> None:
    for found in shared:
        for size, parts in enumerate(found["shared"]):
            assert [item for part in parts for item in part] == list(range(size))
        assert len(found["shared"][5]) == 2
        assert found["from_main"] == [0, "said by the first"]


def test_an_error_of_one_process_ends_the_work_of_all_with_its_message(shared: list[dict[str, Any]]) -> None:
    for found in shared:
        assert found["ours"] == ["PromptError", "the second prompt is too long"]
        assert found["after"] == [0, 1]
    assert shared[1]["defect"] == ["KeyError", "'a defect'"]
    kind, text = shared[0]["defect"]
    assert kind == "RuntimeError" and "process 1 of 2" in text and "in fail" in text and "a defect" in text


def test_two_processes_measure_the_cells_of_one(workplace: Path, shared: list[dict[str, Any]]) -> None:
    assert [found["evaluated"]["code"] for found in shared] == [0, 0]
    names = [{path.name for path in (workplace / f"cells{n}").glob("*")} for n in (1, 2)]
    # Tags that two processes warmed up together may differ by rounding, and then have a cell of another name.
    assert len(names[0]) == len(names[1]) and len(names[0] & names[1]) >= len(names[0]) - 1 > 10
    for name in names[0] & names[1]:
        one, two = (Cell.load(workplace / f"cells{n}" / name) for n in (1, 2))
        for column in ("answers", "predicted", "inside", "episodes", "none"):
            assert np.array_equal(getattr(one, column), getattr(two, column))
        for column in ("confidence", "loss", "out_of_scope"):
            assert np.allclose(getattr(one, column), getattr(two, column), atol=1e-5)
    rows = [[json.loads(line) for line in (workplace / f"rows{n}.jsonl").read_text().splitlines()] for n in (1, 2)]
    told = ("method", "template", "metric", "n_way", "episodes")
    measures = [[tuple(r[key] for key in told) for r in of if r["kind"] == "measure"] for of in rows]
    assert measures[0] == measures[1]
    assert {one[0] for one in measures[1]} >= {"tags", "lora", "plain", "majority", "embedding_knn"}


def test_the_first_process_alone_writes_and_prints(workplace: Path, shared: list[dict[str, Any]]) -> None:
    assert (workplace / "shared.out").read_text().count("rows: rows2.jsonl") == 1
    assert not list(workplace.glob("*.part"))
    assert [found["evaluated"]["joined"] for found in shared] == [1, 1]
    assert all(found["evaluated"]["left"] == [] for found in shared)


def test_a_warm_up_ends_in_all_processes_where_the_first_cannot_write(shared: list[dict[str, Any]]) -> None:
    full = "No space left on device"
    for one in shared:
        assert not any("checkpoint" in name for name in one["spoilt"]["left"])
        for case, message in (("locked", "is writing to it"), ("full", full), ("full for a line", full)):
            kind, told = one["spoilt"][case]
            assert kind == "WarmupError" and message in told, told


def test_an_evaluation_ends_in_all_processes_with_the_error_of_one(
    workplace: Path, shared: list[dict[str, Any]]
) -> None:
    for found in shared:
        assert found["evaluated"]["failed"] == ["PromptError", "the prompt of one process is too long"]
        kind, text = found["evaluated"]["other data"]
        assert kind == "EvaluationError" and "process 1 would measure something else" in text
    assert not list((workplace / "failed").glob("*")) and not (workplace / "failed.jsonl").exists()


@pytest.mark.parametrize("name", KINDS)
def test_a_backbone_split_over_two_processes_gives_the_tags_and_answers_of_a_whole_one(
    name: str, workplace: Path, by: str, split: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = warmed_up(tmp_path / "run", workplace / name)
    ours, theirs = split[0][name], split[1][name]
    rows = model.table.rows.detach()
    assert torch.allclose(torch.tensor(ours["rows"]), rows, atol=1e-5)
    assert ours["rows"] == theirs["rows"] and ours["loss"] == theirs["loss"]
    assert np.allclose(ours["loss"], answer_queries(model, EPISODES).loss, atol=1e-5)
    names = MarkupModel(model.backbone, "markup_letters", model.table.vectors(), answers="names")
    scores = [one.scores.tolist() for found in names.scores(EPISODES) for one in found]
    assert np.allclose(ours["names"], scores, atol=1e-5)
    runs = (workplace / by / name, tmp_path / "run")
    metrics = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    validated = [[row for row in map(json.loads, lines) if "validation_loss" in row] for lines in metrics]
    assert len(validated[0]) == 3
    # The best step may be the first; that tags were trained alike the losses of later steps show.
    trained = [[row for row in map(json.loads, lines) if "gradient_norm" in row] for lines in metrics]
    assert len(trained[0]) == 4
    for a, b in zip(*trained, strict=True):
        assert b["gradient_norm"] > 1e-4
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    for a, b in zip(*validated, strict=True):
        assert a["validation_accuracy"] == b["validation_accuracy"]
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)
    # The files name the same backbone, so that the tags are loaded on a whole one.
    assert Fingerprint.from_json(ours["fingerprint"]) == Fingerprint.of(model.backbone)
    loaded = MarkupModel.from_tags(workplace / by / name / "tags", model.backbone)
    assert torch.allclose(loaded.table.rows, rows, atol=3e-5)


@pytest.mark.parametrize("name", KINDS)
def test_each_process_holds_half_of_the_layers_and_all_of_the_rest(name: str, split: list[dict[str, Any]]) -> None:
    first, second = (found[name] for found in split)
    assert first["held of layers"] + second["held of layers"] == first["in layers"] > 0
    assert 0.45 < first["held of layers"] / first["in layers"] < 0.55
    assert first["held"] == first["all"] - second["held of layers"]
    assert first["trained"] == [] and first["whole"]


def test_processes_that_choose_other_experts_do_not_mix_their_weights_up(split: list[dict[str, Any]]) -> None:
    assert all(found["experts"] < 1e-4 for found in split)


def test_one_process_keeps_the_layers_in_main_memory(workplace: Path, tmp_path: Path) -> None:
    (found,) = launch(workplace, "alone", "fsdp2.yaml", *BY["offloaded"], count=1)
    model = warmed_up(tmp_path / "run", workplace / "bert")
    assert torch.allclose(torch.tensor(found["rows"]), model.table.rows.detach(), atol=1e-5)
    assert Fingerprint.from_json(found["fingerprint"]) == Fingerprint.of(model.backbone)
    assert found["held of layers"] == found["in layers"] > 0
    assert found["policies"] == ["CPUOffloadPolicy"]  # on a CPU its shares lie there anyway


def test_a_changed_shard_is_noticed_by_all_processes(split: list[dict[str, Any]]) -> None:
    for found in split:
        assert found["meddled"][0] == "WarmupError" and "weights changed" in found["meddled"][1]


def test_a_split_backbone_is_not_copied(split: list[dict[str, Any]]) -> None:
    for found in split:
        kind, text = found["bert"]["copied"]
        assert kind == "WarmupError" and "without splitting" in text


def test_a_split_backbone_measures_the_cells_of_a_whole_one(
    workplace: Path, by: str, split: list[dict[str, Any]]
) -> None:
    assert split
    cells = list((workplace / f"{by}-cells").glob("*"))
    assert cells
    for path in cells:
        mine, other = Cell.load(path), Cell.load(workplace / "cells1" / path.name)
        assert np.array_equal(mine.predicted, other.predicted) and np.allclose(mine.loss, other.loss, atol=1e-5)


def test_other_processes_let_the_first_say_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    monkeypatch.setattr(cli, "load_config", _refuse)
    for rank, waits in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["warmup", "missing.yaml"]) == 2
        assert len(waited) == waits
        assert "no such file" in capsys.readouterr().err


def _refuse(*_args: object) -> None:
    raise MarkupError("no such file")
