"""Uploads tags to the Hugging Face Hub: the three files of a tag folder, in one commit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from icl_markup.card import PLACE, backbone_name
from icl_markup.errors import ConfigError, TagFileError
from icl_markup.gguf import is_gguf, on_hub
from icl_markup.hub import CARD, HUB_ERRORS, LIBRARY, explain, is_hub_name
from icl_markup.models import MODELS
from icl_markup.report_rows import parse_row
from icl_markup.tagfile import TagFile, read_tags

MOST_ROWS = 100
"""A card has no more rows of results than a person reads."""

_KEPT = (
    "kind", "experiment", "task", "method", "template", "metric", "value", "low", "high", "n_way", "k_shot",
    "retrieval", "open_world", "vary", "seed", "seeds", "episodes", "queries", "command", "commit",
)  # fmt: skip
"""What of a row travels with the tags."""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        repo_id: the repository.
        commit: its commit, which pins these tags.
        url: the commit's address.
    """

    repo_id: str
    commit: str
    url: str


def push_folder(folder: str | Path, repo_id: str, **options: Any) -> Pushed:
    """Check a tag folder and upload it; a card that was edited by hand is uploaded as it is.

    Args:
        folder: the folder.
        repo_id: ``user/name``.
        **options: as in `push_tags`.

    Raises:
        TagFileError: as in `read_tags` and `push_tags`, or something that belongs on the card is given while the
            card was edited.
    """
    tags = read_tags(Path(folder))
    path = Path(folder) / CARD
    try:
        card = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise TagFileError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if card is not None and card != tags.files()[CARD].decode():
        given = [name for name in ("license", "measured", "backbone") if options.get(name)]
        if given:
            raise TagFileError(
                f"{path}: is not the card that this version writes, so {given[0]} cannot be put on it; write it there "
                "yourself, or delete the file to have it written again"
            )
        options["card"] = card
    return push_tags(tags, repo_id, **options)


def push_tags(
    tags: TagFile,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    license: str = "",
    measured: Iterable[Mapping[str, Any]] = (),
    backbone: str = "",
    card: str | None = None,
) -> Pushed:
    """Upload tags as one commit, to a repository that is made if need be.

    Args:
        tags: the tags.
        repo_id: ``user/name``.
        private: whether a new repository is private; None: what its owner's settings say. One that exists stays as
            it is.
        revision: a branch, made if need be; None: ``main``.
        commit_message: the message of the commit.
        token: a token of the hub with the right to write; None: the one that is logged in with, or ``HF_TOKEN``.
        license: the licence of the tags, by the hub's identifier, such as ``apache-2.0``.
        measured: rows of results (`icl_markup.results`) that were measured with these tags, for the card.
        backbone: the backbone's name on the hub, for tags that were made with a folder of it; ``org/model`` or
            ``org/model@revision``. Whoever loads the tags loads that, and its fingerprint is compared.
        card: the text of the card, instead of a generated one.

    Raises:
        TagFileError: the name is none, the backbone is a folder that nobody else has, a row is none, or the hub
            cannot be reached or refuses; the message says why.
    """
    if not is_hub_name(repo_id):
        raise TagFileError(f"{repo_id!r} is no name of a repository; give user/name, of letters, digits, -, _ and .")
    api = HfApi(token=token, library_name=LIBRARY)
    rows = tuple(_row(row, f"row {number}") for number, row in enumerate(measured, start=1))
    if len(rows) > MOST_ROWS:
        raise TagFileError(f"{len(rows)} rows of results; a card has at most {MOST_ROWS}: choose those of these tags")
    tags = replace(tags, license=license or tags.license, measured=rows or tags.measured)
    tags = replace(tags, backbone=tags.backbone | _backbone(str(tags.backbone["name"]), backbone, api))
    content = tags.files()
    text = content[CARD].decode() if card is None else card
    on_branch = revision is not None and revision != "main"
    # JSON's strings are Python's too: no branch's name leaves its quotes.
    content[CARD] = text.replace(PLACE, json.dumps(f"{repo_id}@{revision}" if on_branch else repo_id)).encode()
    with _asked(f"{repo_id}: not uploaded", repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and on_branch:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        made = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, raw) for name, raw in content.items()],
            commit_message=commit_message or f"Tags for {backbone_name(str(tags.backbone['name']))}",
            revision=revision,
        )
    return Pushed(repo_id, made.oid, str(made.commit_url))


@contextmanager
def _asked(doing: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what goes wrong between us and the hub into one error."""
    try:
        yield
    except HUB_ERRORS as error:
        raise TagFileError(f"{doing}: {explain(error, name, revision)}") from error
    except ValueError as error:  # the hub's own check of the front matter
        raise TagFileError(f"{doing}: {' '.join(str(error).split())}") from error


def _row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        found = parse_row(dict(row), place)
    except ConfigError as error:
        raise TagFileError(f"measured: {error}") from error
    if found.kind != "measure":
        raise TagFileError(f"measured: {place} is a {found.kind}; give rows of the kind measure only")
    if not math.isfinite(found.value):
        raise TagFileError(f"measured: {place} has the value {found.value}; leave it out")
    return {key: found.data[key] for key in _KEPT if found.data.get(key) is not None}


def _backbone(name: str, given: str, api: HfApi) -> dict[str, Any]:
    """Return the name and revision by which others find the backbone."""
    if given:
        name, _, revision = given.partition("@")
        if not is_hub_name(name):
            raise TagFileError(f"backbone {given!r}: give its name on the hub, org/model or org/model@revision")
        if not revision:
            with _asked(f"backbone {name}: its commit was not found", name):
                revision = api.model_info(name).sha or ""
        return {"name": name, "revision": revision}
    known = name in MODELS or (on_hub(name) is not None and not Path(name).is_file())
    local = (
        Path(name).is_dir()
        or PureWindowsPath(name).is_absolute()
        or is_gguf(name)
        or ("/" in name and not is_hub_name(name))
    )
    if local and not known:
        raise TagFileError(
            f"the tags name their backbone by a folder of this machine, {name!r}; say what it is called on the hub: "
            "backbone='org/model'"
        )
    return {}
