"""Model cards: front matter that a hub reads, what is known of the tags, and texts of users that stay texts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.compose import average, rename
from icl_markup.model import MarkupModel
from icl_markup.push import push_tags
from icl_markup.tagfile import read_tags, tags_of, write_tags
from icl_markup.template import Template

NASTY = [
    "quote \" and ' and: colon # hash",
    "line\nbreak\n---\nlicense: stolen\n---\n# Heading",
    "| cell | `code` | ``` fence\n```python\nimport os\n```",
    "<script>alert(1)</script> <!-- hidden",
    "[link](javascript:alert(1)) ![image](x) *bold* _it_ $x$",
    "\x1b[31m \x00 \u2028 é 日本",
    "!!python/object:os.system {a: [b",
]


def card_of(folder: Path) -> tuple[str, dict[str, Any]]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text, yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_a_hub_reads(bert: Backbone, tmp_path: Path) -> None:
    bert.name, bert.revision = "org/tiny-bert", "0123abc"
    text, data = card_of(MarkupModel(bert, "markup_letters").save(tmp_path / "tags", {"tasks": ["one"]}))
    assert data == {
        "library_name": "icl-markup",
        "license": "unknown",
        "base_model": "org/tiny-bert",
        "pipeline_tag": "text-classification",
        "tags": ["icl-markup", "soft-prompt", "in-context-learning", "few-shot-classification", "masked"],
    }
    assert ModelCard(text).data.to_dict() == data
    assert "`org/tiny-bert` at revision `0123abc`" in text and "- tasks: one" in text
    assert "Not measured." in text


def test_a_folder_of_this_machine_is_not_named(bert: Backbone, tmp_path: Path) -> None:
    bert.name = str(tmp_path / "joe" / "my-model")
    text, data = card_of(MarkupModel(bert, "markup_letters").save(tmp_path / "tags"))
    assert "`my-model`" in text and str(tmp_path) not in text and "base_model" not in data


@pytest.mark.parametrize("nasty", NASTY)
def test_texts_of_users_break_neither_yaml_nor_markdown(nasty: str, bert: Backbone, tmp_path: Path) -> None:
    plain_text, _ = card_of(MarkupModel(bert, "markup_letters").save(tmp_path / "plain", training("word")))
    bert.name = nasty
    model = MarkupModel(
        bert, Template.parse(f"# {nasty.splitlines()[0]}\n" + Template.load("markup_letters").source, "x")
    )
    tags = tags_of(model, training(nasty))
    text, data = card_of(write_tags(tags, tmp_path / "tags"))
    assert data["license"] == "unknown"
    assert structure(text) == structure(plain_text)
    assert read_tags(tmp_path / "tags").training == training(nasty)


def structure(text: str) -> list[str]:
    """Return what a Markdown reader makes of a card: blocks, links, images and HTML, without its words."""
    parts = []
    for token in MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2]):
        parts.append(token.type)
        for inner in token.children or ():
            if inner.type in ("link_open", "image", "code_inline", "em_open", "strong_open"):
                parts.append(inner.type)
            elif inner.type == "html_inline" and inner.content not in ("<span>", "</span>"):
                parts.append(inner.content)
    return parts


def training(text: str) -> dict[str, Any]:
    return {"tasks": [text, "two"], text: text, "validation tasks": [text], "validation accuracy": 0.7512}


def test_what_was_measured_stands_in_table_and_front_matter(bert: Backbone, tmp_path: Path) -> None:
    rows = [
        {"experiment": "e", "method": "tags", "task": NASTY[2], "command": "c", "n_way": 5, "k_shot": 1,
         "metric": "accuracy", "value": 0.875, "low": 0.8, "high": 0.9, "episodes": 40},
        {"experiment": "e", "method": "tags", "task": "t", "command": "c", "metric": "auroc", "value": 0.5},
    ]  # fmt: skip
    tags = replace(tags_of(MarkupModel(bert, "markup_letters"), training("w")), measured=tuple(rows), license="mit")
    text, data = card_of(write_tags(tags, tmp_path / "tags"))
    [result] = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.875 and result["task"]["type"] == "text-classification"
    assert result["dataset"]["name"] == " ".join(NASTY[2].split())
    assert data["license"] == "mit" and ModelCard(text).data.eval_results[0].metric_value == 0.875
    assert "| 5 options, 1 demonstration a label | accuracy | 0.875 | 0.8 to 0.9 | 40 |" in text
    assert "Validation accuracy of the warm-up: 0.7512, on w." in text
    assert [row["metric"] for row in read_tags(tmp_path / "tags").measured] == ["accuracy", "auroc"]


def test_the_ancestry_is_told_with_weights_training_and_checksums(bert: Backbone, tmp_path: Path) -> None:
    files = []
    for seed, task in enumerate(("banking", NASTY[1])):
        folder = MarkupModel(bert, "markup_letters", seed=seed).save(tmp_path / f"run{seed}" / "tags", training(task))
        files.append(read_tags(folder))
    mean = average(files, [1, 3])
    text, _ = card_of(write_tags(mean, tmp_path / "mean"))
    assert "Not trained since they were composed" in text and "Not measured since they were composed." in text
    assert "The weighted mean of other tags:\n\n- `run0/tags`: `<classification>`" in text
    assert "weight 0.25; trained on banking, two; validation accuracy then 0.7512" in text
    assert f"SHA-256 of the tensors `{files[1].tensors_sha256[:16]}`" in text
    assert "need not lie between them in quality" in text and "\n# Heading" not in text
    again, _ = card_of(write_tags(rename(read_tags(tmp_path / "mean"), {"<demo>": "<d>"}), tmp_path / "again"))
    assert "`<d> (there <demo>)`" in again and "  The weighted mean of other tags:\n\n  - `run0/tags`" in again


def test_the_snippet_of_a_folder_s_card_runs_with_its_path(
    bert: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert.model.save_pretrained(tmp_path / "model")
    bert.tokenizer.save_pretrained(tmp_path / "model")
    loaded = Backbone.load(BackboneConfig(str(tmp_path / "model"), device="cpu"))
    folder = MarkupModel(loaded, "markup_letters").save(tmp_path / "tags")
    [snippet] = re.findall(r"```python\n(.*?)```", card_of(folder)[0], re.DOTALL)
    assert len(snippet.splitlines()) == 5
    exec(compile(snippet.replace("path/to/this/folder", str(folder)), "card", "exec"), {})
    assert capsys.readouterr().out.split(" {")[0] in ("order status", "refund")


def test_a_snippet_is_not_put_together_from_texts_of_users(bert: Backbone) -> None:
    with pytest.raises(ValueError, match="no name of a repository"):
        push_tags(tags_of(MarkupModel(bert, "markup_letters")), 'user/x"); import os #')
