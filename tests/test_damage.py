"""Files cut short at every length, and with a bit flipped at every place: an error, or nothing that differs.

A bit a byte is flipped; with ICL_MARKUP_EVERY_BIT=1 in the environment all eight are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from icl_markup.cells import Cell
from icl_markup.checkpoint import Progress, load_checkpoint, save_checkpoint
from icl_markup.classifier import MarkupClassifier
from icl_markup.errors import EvaluationError, TagFileError, WarmupError
from icl_markup.files import read_details, write_whole
from icl_markup.model import MarkupModel
from icl_markup.tagfile import TagFile, read_tags
from icl_markup.template import Template
from tests.conftest import TEXTS, tiny_backbone

SMALL = '@tag <is> "label"\n@option\n {symbol}: {name}\n@demo\n{text} <is> {label}\n@query\n{text} <is> {label}\n'


def flipped(whole: bytes) -> Iterator[bytes]:
    for place in range(len(whole)):
        for bit in range(8) if os.environ.get("ICL_MARKUP_EVERY_BIT") else [place % 8]:
            yield whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def optimizer() -> torch.optim.AdamW:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.full((3, 4), 0.5)
    made = torch.optim.AdamW([parameter])
    made.step()
    return made


def content(tags: TagFile) -> tuple[object, ...]:
    vectors = {name: rows.numpy().tobytes() for name, rows in tags.vectors.items()}
    return vectors, replace(tags, vectors={}, template=Template.parse(tags.template.source, "same")), tags.template.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tags") / "tags"
    MarkupModel(tiny_backbone("bert"), Template.parse(SMALL)).save(path, {"steps": 3, "note": "ü"})
    return path


@pytest.mark.parametrize("name", ["tags.safetensors", "tags.json"])
def test_a_tag_folder_with_a_flipped_bit_or_cut_short_is_refused_or_the_same(
    name: str, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tags"
    shutil.copytree(folder, copy)
    right, whole, same = content(read_tags(copy)), (copy / name).read_bytes(), 0
    for data in flipped(whole):
        (copy / name).write_bytes(data)
        try:
            assert content(read_tags(copy)) == right
            same += 1
        except TagFileError as error:
            assert str(error).startswith(str(copy))
    assert same < 60, "the name of the checksum itself, and white space"
    for length in range(len(whole) - 1):
        (copy / name).write_bytes(whole[:length])
        with pytest.raises(TagFileError, match="damaged"):
            read_tags(copy)


def test_the_card_is_for_people_and_never_read(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tags"
    shutil.copytree(folder, copy)
    right = content(read_tags(copy))
    (copy / "README.md").write_bytes(b"\xff" * 100)
    assert content(read_tags(copy)) == right
    (copy / "README.md").unlink()
    assert content(read_tags(copy)) == right


def test_a_folder_from_before_there_was_a_checksum_still_loads(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tags"
    shutil.copytree(folder, copy)
    lines = (copy / "tags.json").read_text().splitlines()
    assert lines[-2].startswith(' "sha256"')
    (copy / "tags.json").write_text("\n".join([*lines[:-3], lines[-3].rstrip(","), "}"]))
    assert content(read_tags(copy)) == content(replace(read_tags(folder), folder=copy))


def test_a_classifier_with_a_flipped_bit_is_refused_or_the_same(tmp_path: Path) -> None:
    model = MarkupModel(tiny_backbone("bert"), Template.parse(SMALL))
    labels = list(TEXTS)
    MarkupClassifier(model).fit([TEXTS[label][0] for label in labels], labels).save(tmp_path / "c")
    path = tmp_path / "c" / "classifier.json"
    right, same = read_details(path, [1], "classifier"), 0
    for data in flipped(path.read_bytes()):
        path.write_bytes(data)
        try:
            found = read_details(path, [1], "classifier")
            assert {key: value for key, value in found.items() if key in right} == right
            same += 1
        except TagFileError:
            pass
    assert same < 60


def test_a_checkpoint_cut_short_at_any_length_or_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    rows, best = torch.rand(3, 4), torch.rand(3, 4)
    save_checkpoint(tmp_path, rows, best, optimizer(), Progress(step=3, schedule={"last_epoch": 3}), {"seed": 1})
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    found = load_checkpoint(tmp_path, optimizer())
    assert torch.equal(found[0], rows) and torch.equal(found[1], best)
    assert (found[2].step, found[3]) == (3, {"seed": 1})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WarmupError, match=r"safetensors: damaged checkpoint .* delete it to start afresh"):
            load_checkpoint(tmp_path, optimizer())
    for data in flipped(whole):
        path.write_bytes(data)
        try:
            again = load_checkpoint(tmp_path, optimizer())
        except WarmupError:
            continue
        assert torch.equal(again[0], rows) and torch.equal(again[1], best) and again[2:] == found[2:]


def test_a_cell_cut_short_at_any_length_is_refused(tmp_path: Path) -> None:
    numbers, values = np.zeros((1, 3), dtype=np.int64), np.ones((1, 3))
    path = tmp_path / "cell.safetensors"
    Cell(numbers, numbers, numbers, values, values, values, numbers[0], numbers[0], {"task": "t"}).save(path)
    whole = path.read_bytes()
    assert Cell.load(path).facts == {"task": "t"}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(EvaluationError, match="remove the file, and it is measured anew"):
            Cell.load(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
