"""The commands that take tags to other tools, run as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icl_markup.cli import main
from icl_markup.exported import Exported
from icl_markup.model import MarkupModel
from icl_markup.tagfile import read_tags
from tests.test_export_merged import tied_llama, warmed

ASKED = [
    "--labels",
    "lost card",
    "weather",
    "--demo",
    "is it cold",
    "weather",
    "--",
    "where is my card",
    "will it rain",
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MarkupModel:
    """A folder with a backbone and tags for it."""
    backbone = tied_llama()
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    backbone.name = "model"
    model = warmed(backbone)
    model.save(tmp_path / "tags")
    return model


def test_tags_travel_to_peft_and_back(workplace: MarkupModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--tags", "tags", "--to", "peft", "--out", "adapter"]) == 0
    assert "logits: those of the live model" in capsys.readouterr().out
    assert main(["import-peft", "adapter", "--backbone", "model", "--out", "again"]) == 0
    before, after = read_tags("tags"), read_tags("again")
    assert all(torch.equal(before.vectors[name], after.vectors[name]) for name in before.vectors)
    assert after.backbone == before.backbone


def test_a_merged_checkpoint_says_how_to_ask_it(workplace: MarkupModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--tags", "tags", "--to", "merged", "--out", "merged"]) == 0
    said = capsys.readouterr().out
    assert "an embedding resized to 430 rows" in said
    assert "prompts: text or token ids" in said
    assert len(Exported.load("merged").placement.all_ids) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--tags", "nowhere", "--to", "peft", "--out", "x"], "nowhere: there is no such folder"),
        (["export", "--tags", "tags", "--to", "merged", "--out", "model"], "holds other files"),
        (["import-peft", "nowhere", "--backbone", "model", "--out", "x"], "folder of a PEFT adapter"),
        (["import-peft", "nowhere", "--backbone", "model", "--out", "x", "--tag", "x"], "write a tag and the ids"),
    ],
)
def test_mistakes_are_told_in_one_line(
    workplace: MarkupModel, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("icl-markup: ")
    assert message in error
