"""Files from a stranger execute nothing: pickles, YAML tags, Jinja, code in a model's folder, links, devices, bombs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from icl_markup import load_config
from icl_markup.backbone import Backbone
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.errors import BackboneError, ConfigError, MarkupError, TagFileError, TemplateError
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.tagfile import load_model, read_tags
from icl_markup.template import Template
from icl_markup.warmup_config import WarmupConfig
from tests.conftest import TEXTS, tiny_backbone


class Bomb:
    """What a pickle executes when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, a tag folder and a classifier."""
    folder = tmp_path_factory.mktemp("made")
    source = tiny_backbone("bert")
    source.model.save_pretrained(folder / "backbone")
    source.tokenizer.save_pretrained(folder / "backbone")
    backbone = Backbone.load(BackboneConfig(str(folder / "backbone"), device="cpu"))
    model = MarkupModel(backbone, "markup_letters")
    labels = list(TEXTS)
    MarkupClassifier(model).fit([TEXTS[label][0] for label in labels], labels).save(folder / "classifier")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of them, in which files may be changed."""
    for path in made.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(made)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def change(path: Path, act: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file as a stranger would, without leaving a checksum that gives it away."""
    details = json.loads(path.read_text())
    details.pop("sha256", None)
    act(details)
    path.write_text(json.dumps(details))


def with_tensors(tags: Path, content: bytes) -> None:
    (tags / "tags.safetensors").write_bytes(content)
    change(tags / "tags.json", lambda d: d.update(tensors_sha256=hashlib.sha256(content).hexdigest()))


def header(told: dict[str, Any], data: bytes = b"") -> bytes:
    raw = json.dumps(told).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_a_pickle_under_the_name_of_tensors_is_refused_and_not_run(folder: Path) -> None:
    canary = folder / "canary"
    torch.save({"a": Bomb(canary)}, folder / "zip")
    for content in (pickle.dumps(Bomb(canary)), (folder / "zip").read_bytes()):
        with_tensors(folder / "classifier" / "tags", content)
        for load in (read_tags, load_model):
            with pytest.raises(TagFileError, match="damaged"):
                load(folder / "classifier" / "tags")
        with pytest.raises(TagFileError):
            MarkupClassifier.load(folder / "classifier")
        for name in ("classifier.json", "tags/tags.json"):
            path = folder / "classifier" / name
            before = path.read_bytes()
            path.write_bytes(content)
            with pytest.raises(TagFileError, match="not valid JSON"):
                MarkupClassifier.load(folder / "classifier")
            path.write_bytes(before)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists(), "the premise: it would have run"


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        header({"<demo>": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"<demo>": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        header({"<demo>": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}, b"\0" * 8),
        header({"../../x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({f"<t{i}>": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}),
    ],
)
def test_tensors_of_huge_or_impossible_shapes_are_refused(content: bytes, folder: Path) -> None:
    with_tensors(folder / "classifier" / "tags", content)
    with pytest.raises(TagFileError):
        read_tags(folder / "classifier" / "tags")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tags", [{"name": "<demo>", "width": 10**400}]),
        ("tags", [{"name": "<demo>", "width": float("inf")}]),
        ("backbone", {"name": {"a": 1}, "revision": None, "kind": "masked", "embedding_width": 32}),
        ("backbone", {"name": "x", "revision": ["main"], "kind": "masked", "embedding_width": 32}),
        ("template", {"name": "../../../etc/passwd", "source": "{{ ''.__class__ }}"}),
        ("template", {"name": "x", "source": "@tag <a> width=999999999"}),
        ("fingerprint", {"embedding_shape": "ab"}),
        ("training", 3),
        ("answers", "__import__('os').system('true')"),
    ],
)
def test_details_of_the_wrong_kind_are_refused(key: str, value: Any, folder: Path) -> None:
    tags = folder / "classifier" / "tags"
    change(tags / "tags.json", lambda d: d.update({key: value}))
    with pytest.raises(TagFileError, match=r"tags.json: damaged|tags.safetensors: damaged"):
        read_tags(tags)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "9" * 10**5, '"\\ud800"', "\ufeff{}", "", "null"])
def test_json_that_is_deep_or_none_is_refused(text: str, folder: Path) -> None:
    for name, load in (("tags/tags.json", lambda f: read_tags(f / "tags")), ("classifier.json", MarkupClassifier.load)):
        path = folder / "classifier" / name
        path.write_text(text, encoding="utf-8")
        with pytest.raises(TagFileError, match="damaged"):
            load(folder / "classifier")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", {"retriever": "os.system"}),
        ("parameters", {"tags": "/etc"}),
        ("parameters", {"options": "many"}),
        ("demonstrations", [{"text": "a", "class": -1}]),
        ("demonstrations", [{"text": "a", "class": 10**9}]),
        ("classes", [{"a": 1}]),
        ("calibration", {"temperature": "0"}),
        ("backbone", 7),
    ],
)
def test_a_classifier_with_parts_of_the_wrong_kind_is_refused(key: str, value: Any, folder: Path) -> None:
    change(folder / "classifier" / "classifier.json", lambda d: d.update({key: value}))
    with pytest.raises(MarkupError):
        MarkupClassifier.load(folder / "classifier").predict(["a text"])


@pytest.mark.parametrize("name", ["tags.json", "tags.safetensors"])
def test_devices_pipes_and_folders_are_not_read_but_links_to_files_are(name: str, folder: Path) -> None:
    """The hub's cache is made of links to files."""
    tags = folder / "classifier" / "tags"
    (tags / name).rename(folder / "elsewhere")
    (tags / name).symlink_to(folder / "elsewhere")
    read_tags(tags)
    for target in ("/dev/zero", "/dev/stdin", str(folder), str(tags / name)):
        (tags / name).unlink()
        (tags / name).symlink_to(target)
        with pytest.raises(TagFileError, match="cannot be read"):
            read_tags(tags)
    (tags / name).unlink()
    os.mkfifo(tags / name)
    with pytest.raises(TagFileError, match="is not a regular file"):
        read_tags(tags)


def test_a_file_that_is_far_too_large_is_not_read_into_memory(folder: Path) -> None:
    with (folder / "classifier" / "tags" / "tags.safetensors").open("r+b") as out:
        out.truncate(2**40)  # sparse: it takes no room
    with pytest.raises(TagFileError, match=r"cannot be read: has 1,099,511,627,776 bytes"):
        read_tags(folder / "classifier" / "tags")


def test_the_code_of_a_backbone_is_never_run_and_nobody_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags name their backbone: a stranger may send both."""
    canary = folder / "canary"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask at the terminal
    code = (
        f"open({str(canary)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass Evil(PretrainedConfig): pass\n"
    )
    for file, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        (folder / "backbone" / "evil.py").write_text(code)
        path = folder / "backbone" / file
        before = path.read_text()
        names = "evil.Evil" if key == "AutoConfig" else ["evil.Evil", "evil.Evil"]
        kind = {"model_type": "never-heard-of"} if key == "AutoConfig" else {"tokenizer_class": "Evil"}
        path.write_text(json.dumps({**json.loads(before), "auto_map": {key: names}, **kind}))
        change(
            folder / "classifier" / "tags" / "tags.json",
            lambda d: d["backbone"].update(name=str(folder / "backbone")),
        )
        try:
            MarkupModel.from_tags(folder / "classifier" / "tags")
        except MarkupError:
            pass
        else:
            assert key == "AutoTokenizer", "a tokenizer is also given by its file alone"
        path.write_text(before)
    assert not canary.exists()


def test_pickled_weights_of_a_backbone_are_not_read(folder: Path) -> None:
    canary = folder / "canary"
    (folder / "backbone" / "model.safetensors").unlink()
    torch.save({"a": Bomb(canary)}, folder / "backbone" / "pytorch_model.bin")
    with pytest.raises(BackboneError):
        Backbone.load(BackboneConfig(str(folder / "backbone"), device="cpu"))
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "output: !!python/object/apply:os.system ['touch canary']",
        "output: !!python/object/new:subprocess.Popen [['touch', 'canary']]",
        "!!python/name:os.system",
        "output: !!python/module:os",
    ],
)
def test_yaml_makes_no_objects(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(WarmupConfig, "a.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(WarmupConfig, None, [f"--output={text.removeprefix('output: ')}"])
    assert not Path("canary").exists()


def test_jinja_in_a_template_is_text_or_an_error(tmp_path: Path) -> None:
    parts = "@option\n{symbol}: {name}\n@demo\n{text} {label}\n@query\n{text} {label}\n"
    with pytest.raises(TemplateError):
        Template.parse("@head\n{{ cycler.__init__.__globals__.os.system('true') }}\n" + parts)
    shown = Template.parse("@head\n\\{\\{ 7*7 \\}\\} $\\{7*7\\} %(a)s\n" + parts)
    assert shown.head[0].value.strip() == "{{ 7*7 }} ${7*7} %(a)s"


def test_names_in_files_lead_nowhere_outside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A template's name is told as it is; nothing is read or written by it."""
    tags = folder / "classifier" / "tags"
    change(tags / "tags.json", lambda d: d["template"].update(name="../../../../outside/x"))
    model = MarkupModel.from_tags(tags, Backbone.load(BackboneConfig(str(folder / "backbone"), device="cpu")))
    before = set(folder.parent.rglob("*"))
    model.save(folder / "again")
    assert set(folder.parent.rglob("*")) - before == {
        folder / "again", *(folder / "again" / n for n in ("tags.json", "tags.safetensors", "README.md"))
    }  # fmt: skip
    assert main(["predict", "--tags", str(folder / "nowhere"), "--labels", "a", "b", "--", "x"]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
