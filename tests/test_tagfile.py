"""Tag folders: what is loaded equals what was trained, another backbone is refused, damage is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.errors import TagFileError
from icl_markup.model import MarkupModel
from icl_markup.tagfile import read_tags
from tests.conftest import tiny_backbone

LABELS = ["lost card", "weather"]


def saved(folder: Path, backbone: Backbone) -> MarkupModel:
    model = MarkupModel(backbone, "markup_letters", seed=5)
    with torch.no_grad():
        model.table.rows.add_(torch.randn_like(model.table.rows))
    model.save(folder, {"steps": 3, "seed": 5})
    return model


def test_what_is_loaded_equals_what_was_saved(backbone: Backbone, tmp_path: Path) -> None:
    model = saved(tmp_path / "tags", backbone)
    loaded = MarkupModel.from_tags(tmp_path / "tags", backbone)
    assert torch.equal(model.table.rows, loaded.table.rows)
    assert loaded.template == model.template or loaded.template.source == model.template.source
    texts = ["where is it", "will it rain"]
    assert loaded.classify(texts, LABELS) == model.classify(texts, LABELS)
    tags = read_tags(tmp_path / "tags")
    assert tags.training == {"steps": 3, "seed": 5}
    assert {name: tuple(v.shape) for name, v in tags.vectors.items()} == {
        tag.name: (tag.width, backbone.width) for tag in model.template.tags
    }


def test_the_folder_is_small_and_saving_again_replaces_it(bert: Backbone, tmp_path: Path) -> None:
    saved(tmp_path / "tags", bert)
    model = saved(tmp_path / "tags", bert)
    names = sorted(path.name for path in (tmp_path / "tags").iterdir())
    assert names == ["README.md", "tags.json", "tags.safetensors"]
    assert sum(path.stat().st_size for path in (tmp_path / "tags").iterdir()) < 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["tags"]
    assert torch.equal(MarkupModel.from_tags(tmp_path / "tags", bert).table.rows, model.table.rows)


def test_a_folder_with_other_files_is_not_replaced(bert: Backbone, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TagFileError, match="holds other files"):
        saved(tmp_path, bert)
    with pytest.raises(TagFileError, match="is a file"):
        saved(tmp_path / "thesis.txt", bert)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_loading_on_another_backbone_is_an_error_that_says_which(tmp_path: Path) -> None:
    saved(tmp_path / "tags", tiny_backbone("bert"))
    with pytest.raises(TagFileError, match="'tiny-bert', not for 'tiny-roberta'"):
        MarkupModel.from_tags(tmp_path / "tags", tiny_backbone("roberta"))
    changed = tiny_backbone("bert")
    with torch.no_grad():
        changed.embedding.weight[9, 9] += 1e-3
    with pytest.raises(TagFileError, match="other values in the embedding table"):
        MarkupModel.from_tags(tmp_path / "tags", changed)


def test_tags_load_on_the_same_backbone_in_another_precision(tmp_path: Path) -> None:
    source = tiny_backbone("llama")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    config = BackboneConfig(str(tmp_path / "model"), device="cpu", precision="none", max_length=200)
    model = saved(tmp_path / "tags", Backbone.load(config))
    half = MarkupModel.from_tags(tmp_path / "tags", BackboneConfig(str(tmp_path / "model"), dtype="bf16", device="cpu"))
    assert torch.equal(half.table.rows, model.table.rows)
    again = MarkupModel.from_tags(tmp_path / "tags")  # the folder names its backbone
    assert again.backbone.name == str(tmp_path / "model")


def test_a_file_cut_short_at_any_length_or_with_a_flipped_bit_is_reported(bert: Backbone, tmp_path: Path) -> None:
    saved(tmp_path / "tags", bert)
    for name in ("tags.safetensors", "tags.json"):
        path = tmp_path / "tags" / name
        whole = path.read_bytes()
        for length in range(0, len(whole) - 2, max(1, len(whole) // 60)):
            path.write_bytes(whole[:length])
            with pytest.raises(TagFileError, match=f"{name}: damaged"):
                read_tags(tmp_path / "tags")
        path.write_bytes(whole)
    path = tmp_path / "tags" / "tags.safetensors"
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(TagFileError, match="damaged"):
            read_tags(tmp_path / "tags")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 3, "format 3; this version reads formats 1 and 2"),
        ("tags", [], "lists"),
        ("tags", [{"name": "<demo>"}], "damaged"),
        ("template", {"name": "x", "source": "@nonsense"}, "damaged template"),
        ("fingerprint", {}, "damaged"),
        ("backbone", {"name": "x"}, "damaged"),
        ("answers", "shouts", "answers is 'shouts'"),
    ],
)
def test_details_that_make_no_sense_are_reported(
    key: str, value: object, message: str, bert: Backbone, tmp_path: Path
) -> None:
    saved(tmp_path / "tags", bert)
    path = tmp_path / "tags" / "tags.json"
    details = json.loads(path.read_text())
    del details["sha256"]  # as in folders of before there was a checksum, and in those that a stranger makes
    details[key] = value
    path.write_text(json.dumps(details))
    with pytest.raises(TagFileError, match=message):
        read_tags(tmp_path / "tags")


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TagFileError, match="is this a tag folder"):
        read_tags(tmp_path / "nowhere")


def test_a_template_without_tags_has_nothing_to_save(bert: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TagFileError, match="no tags to save"):
        MarkupModel(bert, "plain_letters_text_label").save(tmp_path / "tags")


def test_the_card_tells_what_the_tags_are_for(bert: Backbone, tmp_path: Path) -> None:
    saved(tmp_path / "tags", bert)
    card = (tmp_path / "tags" / "README.md").read_text()
    assert "tiny-bert" in card
    assert "MarkupModel.from_pretrained" in card
    assert "`<demo>` | 2" in card
    assert "steps: 3" in card
