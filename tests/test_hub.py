"""Tags on the hub, or a stand-in on this machine: pushed, pinned, used offline; what goes wrong is one clear error."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.errors import TagFileError
from icl_markup.hub import locate
from icl_markup.model import MarkupModel
from icl_markup.push import push_folder
from icl_markup.tagfile import read_tags
from tests.conftest import tiny_backbone
from tests.hub_stand_in import HubStandIn, Repo, hub_for

LABELS = ["lost card", "weather"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    monkeypatch.chdir(tmp_path)
    with hub_for(monkeypatch, tmp_path / "cache") as served:
        yield served


def a_model(seed: int = 0, backbone: Backbone | None = None) -> MarkupModel:
    return MarkupModel(backbone or tiny_backbone("bert"), "markup_letters", seed=seed)


def in_cache(name: str) -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob(name) if path.is_symlink()]


def test_what_is_pushed_comes_back_by_name_with_the_commit_that_it_is_from(hub: HubStandIn) -> None:
    model = a_model(3)
    pushed = model.push_to_hub("user/tags", training={"tasks": ["banking"]}, license="apache-2.0", commit_message="one")
    assert hub.repos["user/tags"].messages[-1] == "one"
    assert sorted(hub.repos["user/tags"].commits[pushed.commit]) == [
        ".gitattributes",
        "README.md",
        "tags.json",
        "tags.safetensors",
    ]
    loaded = MarkupModel.from_pretrained("user/tags", backbone=model.backbone)
    assert torch.equal(loaded.table.rows, model.table.rows)
    assert loaded.origin.commit == pushed.commit and loaded.origin.name == "user/tags"
    assert loaded.origin.training == {"tasks": ["banking"]} and loaded.origin.license == "apache-2.0"
    assert not in_cache(".gitattributes"), "only the files of a tag folder are downloaded"


def test_a_pinned_commit_stays_what_it_was_and_needs_no_hub_afterwards(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = a_model(1), a_model(2)
    pinned = first.push_to_hub("user/tags").commit
    second.push_to_hub("user/tags")
    rows = [
        MarkupModel.from_pretrained(*args, backbone=first.backbone).table.rows
        for args in (("user/tags", pinned), (f"user/tags@{pinned}",), ("user/tags",))
    ]
    assert torch.equal(rows[0], first.table.rows) and torch.equal(rows[1], rows[0])
    assert torch.equal(rows[2], second.table.rows)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for name, model in ((f"user/tags@{pinned}", first), ("user/tags@main", second)):
        assert torch.equal(MarkupModel.from_tags(name, first.backbone).table.rows, model.table.rows)
    assert len(hub.requests) == asked
    with pytest.raises(
        TagFileError, match=r"user/tags@v9: it is not \(or not whole\) in the hub's cache.*HF_HUB_OFFLINE"
    ):
        read_tags("user/tags@v9")
    with pytest.raises(TagFileError, match="user/others: no such folder here, and it is not"):
        read_tags("user/others")
    with pytest.raises(TagFileError, match="user/tags: not uploaded: the hub is switched off: unset HF_HUB_OFFLINE"):
        first.push_to_hub("user/tags")


def test_a_branch_is_made_and_found_by_its_name(hub: HubStandIn) -> None:
    first, second = a_model(1), a_model(2)
    first.push_to_hub("user/tags")
    second.push_to_hub("user/tags", revision="wide")
    assert torch.equal(read_tags("user/tags").vectors["<demo>"], first.table.vectors()["<demo>"])
    wide = read_tags("user/tags", "wide")
    assert torch.equal(wide.vectors["<demo>"], second.table.vectors()["<demo>"])
    assert 'from_pretrained("user/tags@wide")' in (wide.folder / "README.md").read_text()
    odd = first.push_to_hub("user/tags", revision='b"); import os #')
    snippet = (read_tags("user/tags", odd.commit).folder / "README.md").read_text().split("```")[1]
    assert r'from_pretrained("user/tags@b\"); import os #")' in snippet
    second.push_to_hub("user/tags", revision="wide")  # nothing has changed: no error, no second branch


def test_a_private_repository_is_made_on_demand_and_hidden_from_others(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model().push_to_hub("user/secret", private=True)
    a_model().push_to_hub("user/open")
    assert hub.repos["user/secret"].private and not hub.repos["user/open"].private
    monkeypatch.delenv("HF_TOKEN")
    read_tags("user/open")
    with pytest.raises(
        TagFileError, match=r"user/secret: no such folder here, and the hub has no such .*private, log in"
    ):
        read_tags("user/secret")


def test_a_folder_wins_over_a_name_on_the_hub_and_has_no_revisions(hub: HubStandIn, tmp_path: Path) -> None:
    a_model(1).push_to_hub("user/tags")
    assert locate("user/tags").name == "user/tags"
    mine = a_model(2)
    mine.save(tmp_path / "user" / "tags")
    asked = len(hub.requests)
    assert torch.equal(read_tags("user/tags").vectors["<demo>"], mine.table.vectors()["<demo>"])
    for name, revision in (("user/tags@main", None), ("user/tags", "main"), (tmp_path / "user" / "tags", "main")):
        with pytest.raises(TagFileError, match="is read as a folder, which has no revisions"):
            read_tags(name, revision)
    with pytest.raises(TagFileError, match=r"\./user/nothing: there is no such folder"):
        read_tags("./user/nothing")
    with pytest.raises(TagFileError, match="give one of them"):
        read_tags("user/other@a", "b")
    assert len(hub.requests) == asked


def test_what_the_hub_lacks_or_refuses_is_one_clear_error(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = a_model().push_to_hub("user/tags")
    hub.repos["user/gated"] = Repo(gated=True)
    hub.repos["user/gated"].commit(hub.repos["user/tags"].commits[pushed.commit])
    hub.repos["user/model"] = Repo()
    hub.repos["user/model"].commit({"README.md": b"a model", "pickle.bin": b"never read"})
    for name, message in {
        "user/nothing": "user/nothing: no such folder here, and the hub has no such repository",
        "user/tags@nothing": "user/tags@nothing: the hub's repository has no revision 'nothing'",
        f"user/tags@{'0' * 40}": "the hub's repository has no revision '0000",
        "user/gated": rf"repository is gated: accept its conditions at {hub.url}/user/gated and log in",
        "user/model": "user/model: the repository has no tags.json at commit [0-9a-f]{12}: it holds no tags",
    }.items():
        with pytest.raises(TagFileError, match=message) as caught:
            read_tags(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(TagFileError, match=r"the hub refuses access \(401\): log in"):
        read_tags("user/others")
    with pytest.raises(TagFileError, match=r"user/tags: not uploaded: the hub refuses access \(401\)"):
        a_model().push_to_hub("user/tags")


def test_a_hub_that_cannot_be_reached_is_named(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    a_model().push_to_hub("user/tags")
    read_tags("user/tags")
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    assert read_tags("user/tags").name == "user/tags", "what is in the cache is used"
    with pytest.raises(TagFileError, match=f"and {nowhere} cannot be reached"):
        read_tags("user/others")
    with pytest.raises(TagFileError, match=f"not uploaded: {nowhere}: "):
        a_model().push_to_hub("user/tags")


@pytest.mark.parametrize("name", ["tags.safetensors", "tags.json", "README.md"])
def test_a_flipped_bit_is_found_in_what_is_downloaded_and_in_the_cache(hub: HubStandIn, name: str) -> None:
    pushed = a_model().push_to_hub("user/tags")
    raw = hub.repos["user/tags"].commits[pushed.commit][name]
    middle = len(raw) // 2
    hub.damages[name] = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    with pytest.raises(TagFileError, match=f"user/tags@{pushed.commit[:12]}: {name} is damaged.*delete .* and load"):
        read_tags("user/tags")
    hub.damages.clear()
    shutil.rmtree(constants.HF_HUB_CACHE)
    read_tags("user/tags")
    [link] = in_cache(name)
    link.resolve().write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    with pytest.raises(TagFileError, match=f"{name} is damaged"):
        read_tags("user/tags", pushed.commit)


def test_pushing_is_refused_before_anything_is_uploaded(hub: HubStandIn, tmp_path: Path) -> None:
    model = a_model()
    for name in ("tags", "user/tags/more", "user/ta gs", "user/.."):
        with pytest.raises(TagFileError, match="no name of a repository; give user/name"):
            model.push_to_hub(name)
    with pytest.raises(TagFileError, match="row 1: unknown kind 'rumour'"):
        model.push_to_hub("user/tags", measured=[{"kind": "rumour"}])
    with pytest.raises(TagFileError, match="not uploaded: the hub refuses access"):
        model.push_to_hub("other/tags")
    with pytest.raises(TagFileError, match="no tags to save"):
        MarkupModel(model.backbone, "plain_letters_text_label").push_to_hub("user/tags")
    model.backbone.name = str(tmp_path / "secret" / "model")
    with pytest.raises(TagFileError, match=r"by a folder of this machine.*backbone='org/model'"):
        model.push_to_hub("user/tags")
    with pytest.raises(TagFileError, match="backbone org/model: its commit was not found: the hub has no such"):
        model.push_to_hub("user/tags", backbone="org/model")
    model.backbone.name = "runs/models/mine"
    with pytest.raises(TagFileError, match="by a folder of this machine"):
        model.push_to_hub("user/tags")
    model.save(tmp_path / "tags")
    path = tmp_path / "tags" / "tags.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TagFileError, match="damaged"):
        push_folder(tmp_path / "tags", "user/tags")
    assert not [one for one in hub.requests if "preupload" in one or "lfs" in one or "commit/" in one]


def test_a_card_edited_by_hand_is_uploaded_as_it_is(hub: HubStandIn, tmp_path: Path) -> None:
    a_model().save(tmp_path / "tags")
    card = tmp_path / "tags" / "README.md"
    card.write_text(card.read_text() + "\nMade with love.\n")
    with pytest.raises(TagFileError, match="not the card that this version writes, so license cannot be put on it"):
        push_folder(tmp_path / "tags", "user/tags", license="mit")
    push_folder(tmp_path / "tags", "user/tags")
    shared = (read_tags("user/tags").folder / "README.md").read_text()
    assert shared == card.read_text().replace('"path/to/this/folder"', '"user/tags"')
    assert shared.endswith("Made with love.\n")


def test_the_snippet_of_a_shared_card_runs_as_it_stands(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    hub.repos["org/tiny"] = repo = Repo()
    repo.commit({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    model = a_model(4, Backbone.load(BackboneConfig(str(tmp_path / "model"), device="cpu")))
    pushed = model.push_to_hub("user/tags", backbone="org/tiny")
    tags = read_tags("user/tags", pushed.commit)
    assert tags.backbone["name"] == "org/tiny" and tags.backbone["revision"] == repo.refs["main"]
    card = (tags.folder / "README.md").read_text()
    assert str(tmp_path) not in card + (tags.folder / "tags.json").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippet.splitlines()) == 5
    exec(compile(snippet, "card", "exec"), {})
    label, _, probabilities = capsys.readouterr().out.partition(" {")
    wanted = model.classify(["Where is my parcel?"], ["order status", "refund"])[0]
    assert label == wanted.label and repr(wanted.probabilities)[1:] == probabilities.strip()


def test_classifiers_and_commands_take_names_of_the_hub(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    model = a_model(4, Backbone.load(BackboneConfig(str(tmp_path / "model"), device="cpu")))
    model.save(tmp_path / "tags", {"tasks": ["one"]})
    assert main(["push", "tags", "user/tags", "--private", "--message", "first"]) == 2
    assert "by a folder of this machine" in capsys.readouterr().err
    model.backbone.name = "not-a-folder"
    model.save(tmp_path / "tags", {"tasks": ["one"]})
    assert main(["push", "tags", "user/tags", "--private", "--message", "first"]) == 0
    commit = re.search("--tags user/tags@([0-9a-f]{40})", capsys.readouterr().out)[1]
    assert hub.repos["user/tags"].private and hub.repos["user/tags"].messages[-1] == "first"
    backbone = ["--backbone", str(tmp_path / "model"), "--device", "cpu"]
    for named in (["--tags", f"user/tags@{commit}"], ["--tags", "user/tags", "--revision", commit]):
        assert main(["predict", *named, *backbone, "--labels", *LABELS, "--", "where is it"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other
    classifier = MarkupClassifier(f"user/tags@{commit}", backbone=str(tmp_path / "model"), device="cpu")
    classifier.fit(["I lost my card", "will it rain"], LABELS)
    assert classifier.fitted_model().origin.commit == commit
    classifier.save(tmp_path / "classifier")
    assert read_tags(tmp_path / "classifier" / "tags").training == {"tasks": ["one"]}
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"text": "I lost my card", "label": "a"}\n{"text": "will it rain", "label": "b"}\n')
    fit = ["fit", str(examples), "--out", str(tmp_path / "fitted"), "--revision", commit, *backbone]
    assert main([*fit, "--tags", "user/tags"]) == 0
    assert main(fit) == 2 and "--revision is that of --tags" in capsys.readouterr().err
    assert main(["tags", f"user/tags@{commit}"]) == 0
    assert f"user/tags@{commit[:12]}: 5 tags" in capsys.readouterr().out


def test_the_checksum_of_what_is_shared_is_that_of_what_was_saved(hub: HubStandIn, tmp_path: Path) -> None:
    a_model(5).save(tmp_path / "tags")
    push_folder(tmp_path / "tags", "user/tags")
    raw = (tmp_path / "tags" / "tags.safetensors").read_bytes()
    assert hub.lfs == {hashlib.sha256(raw).hexdigest(): raw}
    assert read_tags("user/tags").tensors_sha256 == read_tags(tmp_path / "tags").tensors_sha256
