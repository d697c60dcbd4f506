"""Finds tag folders on disk or on the Hugging Face Hub, where a name may carry a revision: ``user/tags@revision``.

Of a repository only the three files of a tag folder are downloaded, once, into the hub's cache; nothing in them is
executed. What the cache holds is compared with the hub's checksums each time it is used.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from icl_markup.errors import TagFileError
from icl_markup.zoo import zoo_folder

TENSORS, DETAILS, CARD = FILES = ("tags.safetensors", "tags.json", "README.md")
"""The files of a tag folder."""

LIBRARY = "icl-markup"
"""How this package names itself to the hub."""

TRANSPORT: type[Exception] = cast(Any, HfHubHTTPError.__bases__[0])
"""The base of the HTTP client's errors; which client that is depends on the version of huggingface_hub."""

HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    TRANSPORT,
    OSError,
    RuntimeError,  # of hf_xet, which moves large files
    getattr(errors, "XetDownloadError", OSError),
)
"""What goes wrong between a caller and the hub."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"


@dataclass(frozen=True)
class Place:
    """Where a tag folder lies.

    Attributes:
        folder: the folder on disk; in the hub's cache for a folder of the hub.
        name: the repository's name on the hub, or empty.
        commit: the commit of the repository, in full; None for a folder that is not of the hub.
    """

    folder: Path
    name: str = ""
    commit: str | None = None


def locate(tags: str | Path, revision: str | None = None, token: str | None = None) -> Place:
    """Find a tag folder; one of the hub is downloaded unless it is in the cache.

    Args:
        tags: tags of the zoo by their name (`icl_markup.zoo`), a folder, or a hub name such as ``user/tags`` or
            ``user/tags@revision``. A folder of a hub name wins, and a `Path` is always a folder; a name of the zoo
            always means the zoo: write ``./smollm2`` for a folder of that name.
        revision: a commit, tag or branch of the hub; None: ``main``.
        token: a token of the hub; None: the one that is logged in with, or ``HF_TOKEN``.

    Raises:
        TagFileError: the repository or revision does not exist, is gated or private, cannot be reached and is not in
            the cache, or holds no tags; or a folder is given a revision. A folder that does not exist is no error yet.
    """
    shipped = zoo_folder(tags) if isinstance(tags, str) else None
    if shipped is not None:
        _no_revision(str(tags), revision)
        if (Path(tags) / DETAILS).is_file():
            print(f"icl-markup: {tags} means the tags that ship with the package; write ./{tags} for the folder here",
                  file=sys.stderr)  # fmt: skip
        return Place(shipped)
    if isinstance(tags, Path) or Path(tags).is_dir():
        _no_revision(str(tags), revision)
        return Place(Path(tags))
    name, _, written = tags.partition("@")
    if not is_hub_name(name):
        _no_revision(tags, revision)
        return Place(Path(tags))
    if written and revision and written != revision:
        raise TagFileError(f"{tags}: revision {revision!r} is given too; give one of them")
    revision = revision or written or None
    if Path(name).is_dir():
        _no_revision(name, revision)
        return Place(Path(name))
    shown = name if revision is None else f"{name}@{revision}"
    try:
        snapshot = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(FILES), token=token, library_name=LIBRARY)
        )
    except HUB_ERRORS as error:
        known = "" if revision else "no such folder here, and "
        raise TagFileError(f"{shown}: {known}{explain(error, name, revision)}") from error
    commit = snapshot.name
    if not (snapshot / DETAILS).is_file():
        raise TagFileError(f"{shown}: the repository has no {DETAILS} at commit {commit[:12]}: it holds no tags")
    for file in FILES:
        if (snapshot / file).is_file():
            _check_blob(snapshot / file, f"{name}@{commit[:12]}")
    return Place(snapshot, name, commit)


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form of a repository's name with its owner, ``user/name``."""
    if not _NAME.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def explain(error: Exception, name: str, revision: str | None = None) -> str:
    """Return in one line why the hub did not do what it was asked to do, and the remedy."""
    answers = [getattr(one, "response", None) for one in (error, error.__cause__)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    hub = constants.ENDPOINT
    known = (
        (GatedRepoError, f"the hub's repository is gated: accept its conditions at {hub}/{name} and {_LOG_IN}"),
        (
            RevisionNotFoundError,
            f"the hub's repository has no revision {revision!r}; give a commit, tag or branch of it",
        ),
        (RepositoryNotFoundError, f"the hub has no such repository; check the name or, if it is private, {_LOG_IN}"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return text
    if status in (401, 403):
        return f"the hub refuses access ({status}): {_LOG_IN} with a token that has the right to do this"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off: unset HF_HUB_OFFLINE"
    if isinstance(error, LocalEntryNotFoundError):
        is_off = constants.is_offline_mode()
        remedy = "the hub is switched off: unset HF_HUB_OFFLINE" if is_off else f"{hub} cannot be reached"
        return f"it is not (or not whole) in the hub's cache, and {remedy}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{hub}: {lines[0].strip()}"


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise TagFileError(f"{name}: is read as a folder, which has no revisions; leave revision {revision!r} away")


def _check_blob(path: Path, name: str) -> None:
    """Compare a file with its checksum: the cache names what a file links to by it, where it can make links."""
    blob = path.resolve()
    raw = blob.read_bytes()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        found = {hashlib.sha256(raw).hexdigest()}
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        # git's hash of a small file on the hub; mirrors of the hub give that of the content.
        git = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
        found = {git, hashlib.sha1(raw, usedforsecurity=False).hexdigest()}
    else:
        return
    if blob.name not in found:
        raise TagFileError(
            f"{name}: {path.name} is damaged: its content differs from the hub's checksum; delete {blob} and load again"
        )
