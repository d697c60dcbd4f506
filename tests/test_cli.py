"""The commands, run as a user runs them, on a tiny backbone saved in a folder."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from icl_markup.cli import main
from tests.conftest import TEXTS, tiny_backbone


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a backbone, a CSV task and a warm-up configuration."""
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{text},{label}" for label, texts in TEXTS.items() for text in texts]
    (tmp_path / "intents.csv").write_text("utterance,intent\n" + "\n".join(rows) + "\n")
    task = {"path": "intents.csv", "text_column": "utterance", "label_column": "intent"}
    config = {
        "output": "run",
        "backbone": {"name": "model", "device": "cpu", "precision": "none"},
        "tasks": [task],
        "episodes": {"n_way": [2, 3], "k_shot": [0, 1]},
        "optimiser": {"steps": 3, "batch_tokens": 600, "window": 8},
        "validation_tasks": [{**task, "name": "validation"}],
        "validation": {"episodes": 3, "n_way": 2, "every": 2},
    }
    (tmp_path / "warmup.yaml").write_text(yaml.safe_dump(config))
    experiment = {
        "experiment": "tiny",
        "backbone": config["backbone"],
        "tasks": [task],
        "episodes": 5,
        "output": "rows.jsonl",
        "query_split": "train",
        "settings": [{"n_way": 2, "k_shot": 1}, {"n_way": None, "k_shot": 0}],
        "methods": [
            {"name": "chance"},
            {"name": "plain", "templates": ["plain_letters_multiple_choice", "plain_letters_input_category"]},
            {"name": "tags_untrained"},
            {"name": "tags", "folders": ["run/tags"]},
        ],
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_warm_up_evaluate_predict_show_and_inspect(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "warmup.yaml", "--optimiser.steps", "4"]) == 0
    assert "steps: 4" in capsys.readouterr().out

    assert main(["evaluate", "experiment.yaml"]) == 0
    rows = [json.loads(line) for line in (workplace / "rows.jsonl").read_text().splitlines()]
    of_metric = {row["metric"] for row in rows if row["kind"] == "measure"}
    assert of_metric == {"accuracy", "expected_calibration_error"}
    measured = [row for row in rows if row["kind"] == "measure" and row["metric"] == "accuracy"]
    assert len(measured) == 2 * (1 + 2 + 1 + 1 + 1)  # settings x variants, and the mean of the two wordings
    for row in measured:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["command"] == "icl-markup evaluate experiment.yaml"
    assert main(["evaluate", "experiment.yaml"]) == 0
    again = [json.loads(line) for line in (workplace / "rows.jsonl").read_text().splitlines()]
    assert again == rows  # nothing is measured twice
    assert main(["report", "rows.jsonl", "--out", "page/README.md"]) == 0
    page = (workplace / "page" / "README.md").read_text()
    assert "icl-markup evaluate experiment.yaml" in page and "icl-markup report rows.jsonl" in page

    capsys.readouterr()
    arguments = ["predict", "--tags", "run/tags", "--labels", "lost card", "weather", "--demo", "rain?", "weather"]
    assert main([*arguments, "--none-of-the-above", "--", "will it rain", "<label> [MASK]"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["text"] for a in answers] == ["will it rain", "<label> [MASK]"]
    assert list(answers[0]["probabilities"]) == ["lost card", "weather", "none of the above"]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)

    assert main(["show", "--tags", "run/tags", "--labels", "lost card", "weather", "--", "will it rain"]) == 0
    shown = capsys.readouterr().out
    assert "<classification>" in shown and "[CLS]" in shown and "[MASK]" in shown

    assert main(["tags", "run/tags"]) == 0
    assert "<demo>" in capsys.readouterr().out


def test_predict_reads_standard_input_and_files_and_a_task_brings_labels_and_demonstrations(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = workplace / "task"
    task.mkdir()
    lines = [json.dumps({"text": t, "label": label}) for label, texts in TEXTS.items() for t in texts]
    (task / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["predict", "--backbone", "model", "--task", "task", "--shots", "2"]) == 0
    from_input = capsys.readouterr().out
    (workplace / "texts.txt").write_text("one\n\ntwo\n")
    assert main(["predict", "--backbone", "model", "--task", "task", "--shots", "2", "--file", "texts.txt"]) == 0
    assert capsys.readouterr().out == from_input
    assert [json.loads(line)["text"] for line in from_input.splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warmup", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["warmup", "warmup.yaml", "--optimizer.steps", "4"], "unknown key optimizer; did you mean 'optimiser'?"),
        (["warmup", "warmup.yaml", "--template", "plain_letters_text_label"], "no tags"),
        (["warmup", "warmup.yaml", "--tasks.0.text_column", "txt"], "intents.csv:2: no column 'txt'"),
        (["predict", "--backbone", "model", "--", "hello"], "give --labels or --task"),
        (["predict", "--backbone", "model", "--labels", "a", "a", "--", "x"], "twice"),
        (["predict", "--backbone", "model", "--labels", "a", "b", "--", " "], "argument 1: the text is empty"),
        (["predict", "--backbone", "model", "--labels", "a", "b", "--demo", "x", "c", "--", "y"], "has label 'c'"),
        (["predict", "--backbone", "nowhere/at-all", "--labels", "a", "b", "--", "x"], "nowhere/at-all"),
        (["predict", "--tags", "nowhere", "--labels", "a", "b", "--", "x"], "nowhere: there is no such folder"),
        (["predict", "--backbone", "model", "--labels", "a", "b", "--file", "none.txt"], "none.txt: cannot be read"),
        (["show", "--backbone", "model", "--labels", "a", "b", "--chat", "--", "x"], "no chat template"),
        (["tags", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_exit_code_2(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("icl-markup: ")
    assert message in error


@pytest.mark.parametrize("command", ["warmup", "evaluate"])
def test_help_lists_every_key_with_its_docstring(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--backbone.name str  (default: smollm2)" in shown
    assert "A model that ``icl-markup models`` lists, a transformers folder" in shown
