"""Warm-ups that begin with tags: new tags are trained on top of frozen ones, which stay as they are to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from icl_markup import warmup as warmup_module
from icl_markup.backbone import Backbone
from icl_markup.checkpoint import load_checkpoint
from icl_markup.compose import rename
from icl_markup.config import load_config
from icl_markup.errors import ConfigError, PromptError, TagFileError, WarmupError
from icl_markup.model import MarkupModel
from icl_markup.tagfile import read_tags, write_tags
from icl_markup.tags import Tag, TagTable
from icl_markup.warmup import OptimiserConfig, WarmupConfig, run_warmup
from tests.conftest import tiny_backbone, tiny_task
from tests.test_warmup import config_for

NEW = """@tag <demo> width=7 "example"
@tag <hint> width=1 "think"
@tag <label> "answer"
@head
@option
 {symbol}: {name}
@demo
<demo> {text} <hint> <label> {label}
@query
<demo> {text} <hint> <label> {label}
"""


def warm_up(folder: Path, kind: str = "bert", **changes: Any) -> Any:
    """Run a warm-up that keeps the last tags, as no validation chooses others."""
    return run_warmup(
        config_for(folder, **changes),
        tasks=[tiny_task("one"), tiny_task("two")],
        validation_tasks=[],
        backbone=tiny_backbone(kind),
        progress=False,
    )


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tags `a` of the default template, and a template with one tag that they lack."""
    monkeypatch.chdir(tmp_path)
    MarkupModel(tiny_backbone("bert"), "markup_letters", seed=7).save("a", {"tasks": ["earlier"]})
    Path("new.tmpl").write_text(NEW)
    return tmp_path


def test_only_the_new_tag_is_trained_and_the_others_stay_as_they_were_to_the_bit(begun: Path) -> None:
    earlier = read_tags("a")
    result = warm_up(begun / "run", start_from=["a"], template="new.tmpl", train_tags="new")
    made = read_tags(result.folder)
    assert list(made.vectors) == ["<demo>", "<hint>", "<label>"]
    for name in ("<demo>", "<label>"):
        assert torch.equal(made.vectors[name], earlier.vectors[name])
    fresh = MarkupModel(tiny_backbone("bert"), made.template).table.vectors()["<hint>"]
    assert not torch.equal(made.vectors["<hint>"], fresh)
    assert made.training["trained tags"] == ["<hint>"] and made.training["frozen tags"] == ["<demo>", "<label>"]
    [parent] = made.ancestry.parents
    assert made.ancestry.operation == "warm-up" and parent.tensors_sha256 == earlier.tensors_sha256
    assert dict(parent.tags) == {"<demo>": "<demo>", "<label>": "<label>"} and parent.training == {"tasks": ["earlier"]}
    assert result.model.table.rows.shape == (5, 32), "the model that is returned can be trained on as a whole"
    assert torch.equal(result.model.table.vectors()["<hint>"], made.vectors["<hint>"])
    rows = load_checkpoint(begun / "run", torch.optim.AdamW([nn.Parameter(torch.zeros(1, 32))]))[0]
    assert rows.shape == (1, 32), "the optimiser knows of no other rows"


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_named_tags_are_trained_on_every_kind_of_backbone(kind: str, tmp_path: Path) -> None:
    untrained = MarkupModel(tiny_backbone(kind), "markup_letters").table.vectors()
    trained = warm_up(tmp_path / "run", kind, train_tags=["<label>", "<options>"]).model.table.vectors()
    moved = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    assert moved == {"<label>", "<options>"}


def test_all_tags_go_on_from_where_an_earlier_warm_up_ended(begun: Path) -> None:
    earlier = read_tags("a")
    made = read_tags(warm_up(begun / "run", start_from=["a"]).folder)
    assert all(not torch.equal(made.vectors[name], earlier.vectors[name]) for name in made.vectors)
    slow = OptimiserConfig(steps=1, learning_rate=1e-9, warmup_steps=0, batch_tokens=600, window=8)
    same = read_tags(warm_up(begun / "slow", start_from=["a"], optimiser=slow).folder)
    assert all(torch.allclose(same.vectors[name], earlier.vectors[name], atol=1e-6) for name in same.vectors)


def test_gradients_and_their_norm_are_those_of_the_trained_rows_alone(bert: Backbone) -> None:
    rows = torch.randn(4, bert.width)
    tags = [Tag("<a>", 1), Tag("<b>", 2), Tag("<c>", 1)]
    ids = torch.tensor([[bert.first_tag_id + i for i in (3, 1, 0, 2, 1)]])
    whole, part = (TagTable(tags, rows, bert.first_tag_id) for _ in range(2))
    part.freeze(["<a>", "<c>"])
    weight = torch.randn(4, bert.width)
    for table in (whole, part):
        picked = nn.functional.embedding(ids - bert.first_tag_id, table.all_rows())
        (picked * weight[ids - bert.first_tag_id]).sum().backward()
    assert torch.equal(part.all_rows(), rows)
    assert torch.equal(part.rows.grad, whole.rows.grad[1:3])
    assert [name for name, _ in part.named_parameters()] == ["rows"] and not part.frozen.requires_grad
    new = torch.randn(2, bert.width), torch.randn(1, bert.width)
    part.load_vectors({"<b>": new[0], "<c>": new[1]})
    assert torch.equal(part.vectors()["<b>"], new[0]) and torch.equal(part.frozen[1:], new[1])
    part.freeze(["<b>"])
    assert torch.equal(part.all_rows(), torch.cat([rows[:1], *new])) and part.rows.shape[0] == 2
    part.freeze([])
    assert torch.equal(part.rows, torch.cat([rows[:1], *new]))
    with pytest.raises(PromptError, match="no tag <d>"):
        part.freeze(["<d>"])
    with pytest.raises(PromptError, match="shape"):
        part.load_vectors({"<b>": new[1]})


def test_an_interrupted_run_on_frozen_tags_goes_on_to_the_bit(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"start_from": ["a"], "template": "new.tmpl", "train_tags": "new"}
    whole = warm_up(begun / "whole", **options)
    step = warmup_module._Warmup._step

    def interrupt(self: Any, *args: Any) -> Any:
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(warmup_module._Warmup, "_step", interrupt)
        with pytest.raises(WarmupError, match="--resume"):
            warm_up(begun / "cut", **options)
    MarkupModel(tiny_backbone("bert"), "markup_letters", seed=8).save("b")
    with pytest.raises(WarmupError, match="was started with another start_from"):
        warm_up(begun / "cut", resume=True, **{**options, "start_from": ["b"]})
    with pytest.raises(WarmupError, match="was started with another train_tags"):
        warm_up(begun / "cut", resume=True, **{**options, "train_tags": ["<hint>"]})
    resumed = warm_up(begun / "cut", resume=True, **options)
    for name in ("tags.safetensors", "tags.json", "README.md"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (begun / "cut" / name).read_bytes() == (begun / "whole" / name).read_bytes()


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparable = warmup_module._comparable

    def before(config: WarmupConfig) -> dict[str, Any]:
        return {k: v for k, v in comparable(config).items() if k not in ("start_from", "train_tags")}

    with monkeypatch.context() as patch:
        patch.setattr(warmup_module, "_comparable", before)
        first = warm_up(tmp_path / "run")
    assert (warm_up(tmp_path / "run", resume=True).folder / "tags.safetensors").read_bytes() == (
        first.folder / "tags.safetensors"
    ).read_bytes()
    with pytest.raises(WarmupError, match="was started with another train_tags"):
        warm_up(tmp_path / "run", resume=True, train_tags=["<demo>"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start_from": ["a"], "train_tags": "new"}, WarmupError, "has no tag that a lacks; there is nothing to warm"),
        ({"start_from": ["c"], "template": "markup_letters"}, TagFileError, "c: has none of the tags"),
        ({"start_from": ["a", "b"]}, TagFileError, "is in a and, with other values, in b"),
        ({"start_from": ["other"]}, TagFileError, "start_from: other: made for 'tiny-roberta', not for 'tiny-bert'"),
        ({"start_from": ["nowhere"]}, TagFileError, "nowhere: there is no such folder"),
        ({"train_tags": ["<demos>"]}, ConfigError, "no tag <demos>; did you mean '<demo>'"),
    ],
)
def test_what_a_warm_up_cannot_begin_with_is_an_error(
    options: dict[str, Any], error: type[Exception], message: str, begun: Path
) -> None:
    MarkupModel(tiny_backbone("bert"), "markup_letters", seed=8).save("b")
    MarkupModel(tiny_backbone("roberta"), "markup_letters").save("other")
    names = {name: f"<x{i}>" for i, name in enumerate(read_tags("a").vectors)}
    write_tags(rename(read_tags("a"), names), "c")
    with pytest.raises(error, match=message):
        warm_up(begun / "run", **options)
    assert not (begun / "run").exists()


def test_the_keys_are_read_from_configurations(tmp_path: Path) -> None:
    path = tmp_path / "warmup.yaml"
    path.write_text("tasks: []\nstart_from: [a, user/tags@v1]\ntrain_tags: new\n")
    config = load_config(WarmupConfig, path)
    assert config.start_from == ["a", "user/tags@v1"] and config.train_tags == "new"
    assert load_config(WarmupConfig, path, ["--train_tags", "['<demo>']"]).train_tags == ["<demo>"]
    for overrides, message in (
        (["--start_from", "[]"], "every tag is new"),
        (["--train_tags", "[]"], "trains nothing"),
        (["--train_tags", "old"], "train_tags"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(WarmupConfig, path, overrides)
