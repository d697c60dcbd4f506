"""Two runs never write to one output, and a run that was killed is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from icl_markup.cli import main
from icl_markup.errors import EvaluationError, MarkupError, PromptError, WarmupError
from icl_markup.experiment import load_experiment, run_experiment
from icl_markup.lock import only_run
from icl_markup.output import resumed
from icl_markup.predict import Text
from tests.test_warmup import warm_up


def holder(path: Path, folder: bool) -> int:
    """Start a process that holds the lock of an output until it is killed; return its id."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with only_run(path, MarkupError, folder=folder):
                os.write(told, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    return child


@pytest.mark.parametrize("folder", [True, False])
def test_the_second_run_is_told_who_the_first_is_and_a_killed_one_holds_nothing(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    child = holder(path, folder)
    told = rf"{path}: another run \(process {child} on .*choose another output"
    with pytest.raises(WarmupError, match=told), only_run(path, WarmupError, folder=folder):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    mine = rf"process {os.getpid()}"
    with only_run(path, WarmupError, folder=folder), pytest.raises(WarmupError, match=mine):
        only_run(path, WarmupError, folder=folder).__enter__()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == []


def test_an_error_in_the_run_frees_the_output(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_run(tmp_path / "a", WarmupError):
        raise KeyError
    with only_run(tmp_path / "a", WarmupError):
        pass


def test_an_output_by_another_name_is_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (True, False):
        with only_run(tmp_path / "a", WarmupError, folder=folder), pytest.raises(WarmupError, match="another run"):
            only_run(tmp_path / "link" / "." / "a", WarmupError, folder=folder).__enter__()


def test_an_output_in_a_missing_folder_is_an_error_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be written"), only_run(tmp_path / "no" / "a", PromptError):
        pass
    assert not (tmp_path / "no").exists()


def test_warm_up_evaluation_and_prediction_each_refuse_an_output_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with only_run(Path("run"), WarmupError, folder=True):
        with pytest.raises(WarmupError, match="run: another run"):
            warm_up(Path("run"))
        assert [path.name for path in Path("run").iterdir()] == [".lock"]
    Path("a.csv").write_text("text,label\na,x\nb,y\n")
    told = {"experiment": "e", "tasks": [{"path": "a.csv"}], "output": "rows.jsonl", "methods": [{"name": "chance"}]}
    Path("experiment.yaml").write_text(json.dumps({**told, "settings": [{"n_way": None, "k_shot": 0}]}))
    with only_run(Path("rows.jsonl"), EvaluationError):
        with pytest.raises(EvaluationError, match=r"rows.jsonl: another run"):
            run_experiment(load_experiment("experiment.yaml"), "x", progress=False)
        assert main(["evaluate", "experiment.yaml"]) == 2
        assert "choose another output" in capsys.readouterr().err
    Path("out.jsonl").write_text("precious")
    with only_run(Path("out.jsonl"), PromptError), pytest.raises(PromptError, match=r"out.jsonl: another run"):
        resumed("out.jsonl", iter([Text("1", "a")])).__enter__()
    assert Path("out.jsonl").read_text() == "precious"
