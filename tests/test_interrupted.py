"""Runs that are interrupted or killed: they say how to go on, and end with the bytes of a run that was left alone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icl_markup import output, predict
from icl_markup.cli import main
from icl_markup.model import MarkupModel
from icl_markup.warmup import _Warmup
from tests.conftest import TEXTS, tiny_backbone

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, two classifiers, texts, and configurations of a warm-up and an experiment."""
    folder = tmp_path_factory.mktemp("place")
    backbone = tiny_backbone("bert")
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(folder / "backbone")
    rows = [(text, label) for label, texts in TEXTS.items() for text in texts]
    for name, chosen in (("a", rows), ("b", rows[1:]), ("c", rows[:-4])):
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"{t},{i}\n" for t, i in chosen))
        told = ["fit", str(folder / f"{name}.csv"), "--backbone", str(folder / "backbone"), "--out", str(folder / name)]
        assert main([*told, "--shots", "1"]) == 0
    (folder / "texts.txt").write_text("".join(f"{t} {i}\n" for i in range(2) for t, _ in rows))
    run = {
        "output": "run",
        "backbone": {"name": str(folder / "backbone"), "device": "cpu", "precision": "none"},
        "tasks": [{"path": str(folder / "a.csv")}],
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1]},
        "optimiser": {"steps": 4, "batch_tokens": 600, "window": 8},
        "validation_tasks": [{"path": str(folder / "b.csv")}],
        "validation": {"episodes": 3, "n_way": 2, "every": 2},
    }
    (folder / "warmup.yaml").write_text(json.dumps(run))
    methods = [{"name": name} for name in ("chance", "plain", "tags_untrained")]
    methods[1]["templates"] = ["plain_letters_multiple_choice"]  # type: ignore[assignment]
    measured = {
        "experiment": "e",
        "backbone": run["backbone"],
        "tasks": run["tasks"],
        "episodes": 3,
        "methods": methods,
    }
    more = {"output": "rows.jsonl", "cells": "cells", "query_split": "train", "settings": [{"n_way": 2, "k_shot": 1}]}
    (folder / "experiment.yaml").write_text(json.dumps({**measured, **more}))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def interrupted_at(call: int, function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """A function that is interrupted when it is called for the n-th time."""
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return function(*args, **options)

    return wrapped


def control_c() -> None:
    raise KeyboardInterrupt


def goes_on(error: str) -> list[str]:
    """The command that a message tells to go on with."""
    return shlex.split(error.rstrip().splitlines()[-1].split("go on with: ")[1])[1:]


def whole_and_cut(
    command: list[str], owner: Any, name: str, call: int, act: Callable[[], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> str:  # fmt: skip
    """Run a command alone, and again with an interruption and the command it then names; return what was said."""
    for name_of in ("whole", "cut"):
        (tmp_path / name_of).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert main(command) == 0
    monkeypatch.chdir(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted_at(call, getattr(owner, name), act))
        capsys.readouterr()
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert main(goes_on(said)) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    return said


def test_a_warm_up_that_is_interrupted_saves_and_names_the_command_that_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    command = ["warmup", str(place / "warmup.yaml"), "--save_every", "3"]
    said = whole_and_cut(command, _Warmup, "_step", 2, stop, tmp_path, monkeypatch, capsys)
    assert "interrupted; run holds step 2" in said and said.rstrip().endswith("--save_every 3 --resume true")


def test_an_evaluation_that_is_interrupted_keeps_its_cells_and_names_the_command_that_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(place / "experiment.yaml")]
    said = whole_and_cut(command, MarkupModel, "scores", 2, control_c, tmp_path, monkeypatch, capsys)
    assert "what was measured is kept" in said


def test_a_prediction_that_is_interrupted_in_a_chunk_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (predict, output):
        monkeypatch.setattr(module, "CHUNK", 8)
    command = ["predict", "--classifier", str(place / "a"), "--file", str(place / "texts.txt"), "--out", "out.jsonl"]
    said = whole_and_cut(command, predict, "_json", 13, control_c, tmp_path, monkeypatch, capsys)
    assert "icl-markup: interrupted\nthe answers so far are kept" in said
    whole = (tmp_path / "whole" / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for done in (1, 7, 8, 9, 16, 31, len(lines)):
        for rest in (b"", lines[done][:20] if done < len(lines) else b""):
            Path("out.jsonl").write_bytes(b"".join(lines[:done]) + rest)
            assert main(command) == 0
            assert Path("out.jsonl").read_bytes() == whole, done


@pytest.mark.parametrize("changed", [["--classifier", "b"], ["--classifier", "c"], ["--top", "2"]])
def test_an_output_is_not_gone_on_with_by_another_command(
    changed: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    command = ["predict", "--classifier", "a", "--file", "texts.txt", "--out", str(tmp_path / "out.jsonl")]
    assert main(command) == 0
    for kept in (3, None):
        half = b"".join((tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)[:kept])
        (tmp_path / "out.jsonl").write_bytes(half)
        assert main([*command, *changed]) == 2
        assert "was begun with another classifier, other labels or another --top" in capsys.readouterr().err
        assert (tmp_path / "out.jsonl").read_bytes() == half, "nothing of it is lost"
        assert main(command) == 0


def test_other_labels_are_noticed_where_only_the_best_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    command = ["predict", "--backbone", "backbone", "--top", "1", "--out", str(tmp_path / "o.jsonl"), "--labels"]
    assert main([*command, "cold", "warm", "--", "is it cold"]) == 0
    assert main([*command, "cold", "warm", "--", "is it cold", "is it warm"]) == 0
    assert main([*command, "cold", "warm", "wet", "--", "is it cold", "is it warm"]) == 2
    assert "other labels" in capsys.readouterr().err


def test_runs_that_are_killed_at_random_moments_end_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    """The short form of `python scripts/stress_kill.py results/bench/robustness.jsonl --kills 50`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "stress_kill.py"), str(tmp_path / "rows.jsonl"), "--kills", "2",
         "--steps", "6", "--texts", "270"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kills"] for row in rows] == [2, 2, 2]
    assert all(row["files"] > 0 and not row["different_files"] for row in rows)
