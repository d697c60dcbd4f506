"""A full disk and a read-only one: one clear error, what was there before is intact, and with room again a run goes on.

Disks are real ones, in memory; where none may be mounted, the tests skip.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from icl_markup import experiment
from icl_markup.checkpoint import load_checkpoint
from icl_markup.classifier import MarkupClassifier
from icl_markup.errors import EvaluationError, MarkupError, PromptError, TagFileError, WarmupError
from icl_markup.experiment import load_experiment, run_experiment
from icl_markup.model import MarkupModel
from icl_markup.output import resumed
from icl_markup.predict import Answer, Text, predict_lines
from icl_markup.tagfile import read_tags
from icl_markup.warmup import _Warmup
from tests.conftest import TEXTS, tiny_backbone
from tests.test_interrupted import interrupted_at, place
from tests.test_warmup import warm_up

__all__ = ["place"]  # a fixture


def mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Disk:
    """A disk of a quarter of a megabyte."""

    def __init__(self, path: Path):
        self.path = path

    def fill(self, spare: int = 0) -> None:
        """Leave no room, or so many bytes (in whole pages)."""
        with (self.path / "filler").open("wb", buffering=0) as out:
            try:
                while True:
                    out.write(b"\0" * 4096)
            except OSError:
                pass
        if spare:
            with (self.path / "filler").open("r+b") as out:
                out.truncate((self.path / "filler").stat().st_size - spare)

    def clear(self) -> None:
        (self.path / "filler").unlink()

    def read_only(self) -> None:
        """Lay the same disk over itself, read-only: that is possible while a run has files open on it."""
        assert mount("--bind", str(self.path), str(self.path)) and mount("-o", "remount,bind,ro", str(self.path))

    def writable(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)):
        pytest.skip("a disk in memory cannot be mounted here: this needs the right to mount")
    try:
        yield Disk(path)
    finally:
        while path.is_mount():
            subprocess.run(["umount", "-l", str(path)], check=True)


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if name.name not in ("filler", "config.yaml")}


def step_of(folder: Path) -> int:
    return load_checkpoint(folder, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(10, 32))]))[2].step


def test_a_warm_up_that_fills_the_disk_keeps_its_checkpoint_and_goes_on_with_room(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(_Warmup, "_step", interrupted_at(4, _Warmup._step, disk.fill))
        with pytest.raises(WarmupError, match=r"No space left on device; what was saved before is intact.* resume"):
            warm_up(disk.path / "run")
    assert step_of(disk.path / "run") == 2
    disk.clear()
    warm_up(disk.path / "run", resume=True)
    assert files(disk.path / "run") == files(tmp_path / "whole")


def test_a_warm_up_in_a_read_only_folder_is_refused_and_one_that_becomes_so_goes_on_later(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.read_only()
    with pytest.raises(WarmupError, match="cannot be written: Read-only file system"):
        warm_up(disk.path / "run")
    disk.writable()
    with monkeypatch.context() as patch:
        patch.setattr(_Warmup, "_step", interrupted_at(5, _Warmup._step, disk.read_only))
        with pytest.raises(WarmupError, match="Read-only file system"):
            warm_up(disk.path / "run")
    assert step_of(disk.path / "run") == 4
    disk.writable()
    warm_up(disk.path / "run", resume=True)
    warm_up(tmp_path / "whole")
    assert files(disk.path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("trouble", ["fill", "read_only"])
def test_tags_and_classifiers_that_cannot_be_replaced_stay_as_they_were(trouble: str, disk: Disk) -> None:
    model = MarkupModel(tiny_backbone("bert"), "markup_letters")
    labels = list(TEXTS)
    classifier = MarkupClassifier(model).fit([TEXTS[label][0] for label in labels], labels)
    model.save(disk.path / "tags")
    classifier.save(disk.path / "classifier")
    before = files(disk.path)
    getattr(disk, trouble)()
    classifier.partial_fit(["a new text"], [labels[0]])
    with torch.no_grad():
        model.table.rows.add_(1)
    for save in (lambda: model.save(disk.path / "tags"), lambda: classifier.save(disk.path / "classifier")):
        with pytest.raises(TagFileError, match=r"cannot write the .*(No space left|Read-only)"):
            save()
    assert files(disk.path) == before
    assert not read_tags(disk.path / "tags").vectors["<demo>"].equal(model.table.vectors()["<demo>"])


def test_an_evaluation_that_fills_the_disk_keeps_its_cells_and_goes_on_with_room(
    disk: Disk, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"--{name}={disk.path / name}" for name in ("cells", "output")]
    config = load_experiment(place / "experiment.yaml", changes)
    save = experiment.Cell.save
    with monkeypatch.context() as patch:
        patch.setattr(experiment.Cell, "save", interrupted_at(2, save, disk.fill))
        with pytest.raises(EvaluationError, match=r"No space left on device; what was measured before is intact"):
            run_experiment(config, "x", progress=False)
    kept = files(disk.path)
    assert len(kept) == 1 and not (disk.path / "output").exists()
    disk.clear()
    rows = run_experiment(config, "x", progress=False)
    assert files(disk.path).items() >= kept.items()
    disk.read_only()
    with pytest.raises(EvaluationError, match="Read-only file system"):
        run_experiment(config, "x", progress=False)
    assert len((disk.path / "output").read_text().splitlines()) == len(rows)


def test_a_prediction_that_fills_the_disk_keeps_its_answers_and_goes_on_with_room(disk: Disk, tmp_path: Path) -> None:
    def ask(texts: list[str]) -> list[Answer]:
        return [{"label": text[:1], "probabilities": {"a": 0.25, "b": 0.75}} for text in texts]

    def run(path: Path) -> None:
        texts = (Text(f"line {i}", f"{'ab'[i % 2]} {i} " + "x" * 90) for i in range(300))
        with resumed(path, texts) as found:
            list(found.write(predict_lines(ask, found.texts)))

    path = disk.path / "out.jsonl"
    run(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    disk.fill(spare=5 * 4096)
    with pytest.raises(PromptError, match=r"out.jsonl: cannot be written: No space left on device; the answers before"):
        run(path)
    cut = path.read_bytes()
    assert 4096 < len(cut) < len(whole) and whole.startswith(cut)
    disk.clear()
    disk.read_only()
    with pytest.raises(PromptError, match="cannot be written: Read-only file system"):
        run(path)
    disk.writable()
    assert path.read_bytes() == cut
    run(path)
    assert path.read_bytes() == whole
    assert [p.name for p in disk.path.iterdir()] == ["out.jsonl"]


def test_a_write_that_fails_without_a_disk_to_fill_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a mount: the error of the system is made up."""

    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    warm_up(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupted_at(4, lambda _descriptor: None, full))
        with pytest.raises(MarkupError, match="No space left on device"):
            warm_up(tmp_path / "run")
    warm_up(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
