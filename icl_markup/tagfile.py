"""Tag folders: ``tags.safetensors`` (one tensor a tag), ``tags.json`` (everything else) and a model card.

A folder is a few kilobytes, holds nothing that is executed, and is written whole or not at all. It names the
backbone that its tags were made for, and loading it on another one is an error. The same backbone in another type, or
quantised, is not another one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, float32

from icl_markup.ancestry import Ancestry, Parent
from icl_markup.answers import Answers
from icl_markup.backbone import Backbone
from icl_markup.card import model_card
from icl_markup.chat import ChatFrame
from icl_markup.errors import ConfigError, TagFileError, TemplateError, nearest
from icl_markup.files import read_details, read_regular, replace_folder, sealed
from icl_markup.fingerprint import Fingerprint
from icl_markup.hub import CARD, DETAILS, TENSORS, locate
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.report_rows import parse_row
from icl_markup.template import Template
from icl_markup.zoo import zoo_names

FORMAT = 1
"""Keys that were added since are optional, and earlier versions of this package pass over them."""

FORMAT_IN_CHAT = 2
"""The format of tags that stand in a chat, which a version that knows no chats must not read."""

_MOST_TENSORS = 2**30
"""Tensors of more bytes than this are not read; the widest tags of the widest model take a hundredth of it."""


@dataclass(frozen=True)
class TagFile:
    """The content of a tag folder, or what one is made of.

    Attributes:
        folder: where it was read; None for tags that were composed and not written.
        vectors: rows by tag name, each of shape (width, embedding width), fp32.
        template: the template that the tags were warmed up in.
        backbone: the backbone's name, revision, kind, embedding width and quantisation.
        fingerprint: that of the backbone.
        answers: symbols or names.
        length_normalised: whether names are scored by the mean log-probability of their tokens.
        training: the summary of the warm-up; empty for untrained and for composed tags.
        chat: what stands around a prompt in a chat, as it was when the tags were warmed up; None: no chat.
        tensors_sha256: the checksum of ``tags.safetensors``.
        license: the licence of the tags, by the hub's identifier; empty where nobody named one.
        measured: rows of results (`icl_markup.results`) that were measured with these tags.
        ancestry: the tags that these were made of or begun with.
        name: its name on the hub; empty for a folder of no hub.
        commit: the hub's commit that it was read from.
    """

    folder: Path | None
    vectors: dict[str, Tensor]
    template: Template
    backbone: dict[str, Any]
    fingerprint: Fingerprint
    answers: Answers
    length_normalised: bool
    training: dict[str, Any]
    chat: ChatFrame | None = None
    tensors_sha256: str = ""
    license: str = ""
    measured: tuple[dict[str, Any], ...] = field(default=())
    ancestry: Ancestry | None = None
    name: str = ""
    commit: str | None = None

    @property
    def label(self) -> str:
        """How messages name it: its folder, its name and commit on the hub, or what it was composed of."""
        if self.name:
            return f"{self.name}@{(self.commit or '')[:12]}"
        if self.folder is not None:
            return str(self.folder)
        parents = self.ancestry.parents if self.ancestry else ()
        return f"({self.ancestry.operation if self.ancestry else 'tags'} of {', '.join(p.name for p in parents)})"

    def as_parent(self, tags: Mapping[str, str] | None = None, weight: float | None = None) -> Parent:
        """Return it as a parent of other tags.

        Args:
            tags: which tags were used: their names here, by their new names; None: all, under their own names.
            weight: its share in an average.
        """
        used = {name: name for name in self.vectors} if tags is None else tags
        if self.folder is None and self.ancestry and self.ancestry.operation in ("select", "rename"):
            # Nobody ever saw the intermediate result: what counts is what it was selected from.
            [whole] = self.ancestry.parents
            return replace(whole, tags={new: whole.tags[old] for new, old in used.items()}, weight=weight)
        name = self.name or (_short(self.folder) if self.folder is not None else "")
        return Parent(name, self.tensors_sha256, dict(used), weight, self.commit, self.training, self.ancestry)

    def details(self) -> dict[str, Any]:
        """Return the content of ``tags.json``."""
        optional = {
            "chat": self.chat and self.chat.to_json(),
            "license": self.license,
            "measured": list(self.measured),
            "ancestry": self.ancestry and self.ancestry.to_json(),
        }
        return {
            "format": FORMAT if self.chat is None else FORMAT_IN_CHAT,
            "tags": [{"name": t.name, "width": t.width, "description": t.description} for t in self.template.tags],
            "tensors_sha256": self.tensors_sha256,
            "backbone": self.backbone,
            "fingerprint": self.fingerprint.to_json(),
            "template": {"name": Path(self.template.name).stem, "source": self.template.source},
            "answers": self.answers,
            "length_normalised": self.length_normalised,
            "training": self.training,
            **{key: value for key, value in optional.items() if value},
        }

    def files(self) -> dict[str, bytes]:
        """Return the content of each file of the folder."""
        tensors = serialised(self.vectors)
        details = self.details()
        return {
            TENSORS: tensors,
            DETAILS: sealed(details),
            CARD: model_card(details, len(tensors)).encode(),
        }


def serialised(vectors: Mapping[str, Tensor]) -> bytes:
    """Return vectors by tag name as the content of ``tags.safetensors``."""
    tensors = {name: rows.contiguous() for name, rows in vectors.items()}
    return bytes(save_tensors(tensors, metadata={"format": "icl-markup"}))


def checksum(vectors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of that content."""
    return hashlib.sha256(serialised(vectors)).hexdigest()


def tags_of(model: MarkupModel, training: dict[str, Any] | None = None, ancestry: Ancestry | None = None) -> TagFile:
    """Return a model's tags as the content of a folder.

    What is known of tags that were loaded stays with them; where their values were changed since, they become the
    parents of the new ones.

    Args:
        model: the model.
        training: the summary of the warm-up; None: that of the tags as they were loaded.
        ancestry: what the tags were begun with; None: what is known.

    Raises:
        TagFileError: the template has no tags.
    """
    if model.table is None:
        raise TagFileError(f"template {model.template.name!r} has no tags to save")
    backbone, origin = model.backbone, model.origin
    vectors = model.table.vectors()
    found = TagFile(
        None,
        vectors,
        model.template,
        {
            "name": backbone.name,
            "revision": backbone.revision,
            "kind": backbone.kind,
            "embedding_width": backbone.width,
            "quantisation": backbone.quantisation,
        },
        Fingerprint.of(backbone),
        model.answers,
        model.length_normalised,
        training or {},
        model.chat,
        checksum(vectors),
        ancestry=ancestry,
    )
    if origin is None or ancestry is not None:
        return found
    if origin.tensors_sha256 != found.tensors_sha256:
        return replace(found, license=origin.license, ancestry=Ancestry("change", (origin.as_parent(),)))
    return replace(
        found,
        training=origin.training if training is None else training,
        license=origin.license,
        measured=origin.measured,
        ancestry=origin.ancestry,
    )


def save_model(
    model: MarkupModel, folder: str | Path, training: dict[str, Any] | None = None, ancestry: Ancestry | None = None
) -> Path:
    """Write a model's tags; see `MarkupModel.save` and, for `ancestry`, `tags_of`."""
    return write_tags(tags_of(model, training, ancestry), folder)


def write_tags(tags: TagFile, folder: str | Path) -> Path:
    """Write a tag folder, in place of at most another one.

    Raises:
        TagFileError: `folder` is a file or holds something else, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise TagFileError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DETAILS).exists():
        raise TagFileError(f"{folder}: holds other files and no tags; choose an empty or a new folder")
    try:
        replace_folder(folder, tags.files())
    except OSError as error:
        raise TagFileError(f"{folder}: cannot write the tags: {error}") from error
    return folder


def read_tags(tags: str | Path, revision: str | None = None, token: str | None = None) -> TagFile:
    """Read and check a tag folder.

    Args:
        tags: a folder or a hub name, ``user/tags`` or ``user/tags@revision``; see `icl_markup.hub.locate`.
        revision: a commit, tag or branch of the hub.
        token: a token of the hub.

    Raises:
        TagFileError: a file is missing, damaged or of a later format, or the files contradict each other; or the hub
            does not give the folder.
    """
    place = locate(tags, revision, token)
    folder = place.folder
    if isinstance(tags, str) and not folder.exists():
        known = zoo_names()
        shipped = f"; the package has tags named {', '.join(known)}" if known else ""
        raise TagFileError(f"{tags}: there is no such folder{nearest(tags, known)}{shipped}")
    details = read_details(folder / DETAILS, (FORMAT, FORMAT_IN_CHAT), "tag")
    path = folder / TENSORS
    try:
        raw = read_regular(path, _MOST_TENSORS)
    except OSError as error:
        raise TagFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if hashlib.sha256(raw).hexdigest() != details["tensors_sha256"]:
            raise TagFileError(f"{path}: damaged: its content differs from what {DETAILS} says (SHA-256)")
        ancestry = details.get("ancestry")
        answers: Any = str(details["answers"])
        result = TagFile(
            folder,
            load_tensors(raw),
            Template.parse(str(details["template"]["source"]), str(details["template"]["name"])),
            dict(details["backbone"]),
            Fingerprint.from_json(details["fingerprint"]),
            answers,
            bool(details["length_normalised"]),
            dict(details["training"]),
            ChatFrame.from_json(details["chat"]) if details["format"] == FORMAT_IN_CHAT else None,
            str(details["tensors_sha256"]),
            str(details.get("license", "")),
            tuple(dict(parse_row(row, str(folder / DETAILS)).data) for row in details.get("measured", ())),
            None if ancestry is None else Ancestry.from_json(ancestry),
            place.name,
            place.commit,
        )
        declared = {str(t["name"]): int(t["width"]) for t in details["tags"]}
        width = int(result.backbone["embedding_width"])
        _check_backbone(result.backbone)
    except SafetensorError as error:
        raise TagFileError(f"{path}: damaged: {error}") from error
    except TemplateError as error:
        raise TagFileError(f"{folder / DETAILS}: damaged template: {error}") from error
    except ConfigError as error:
        raise TagFileError(f"{folder / DETAILS}: damaged: {error}") from error
    except (KeyError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if isinstance(error, TagFileError):
            raise
        raise TagFileError(f"{folder / DETAILS}: damaged: {type(error).__name__} {error}") from error
    expected = {name: (rows, width) for name, rows in declared.items()}
    found = {name: tuple(value.shape) for name, value in result.vectors.items()}
    if found != expected or {t.name: t.width for t in result.template.tags} != declared:
        raise TagFileError(f"{path}: damaged: holds {found}, but {DETAILS} lists {expected}")
    for name, rows in result.vectors.items():
        if rows.dtype != float32 or not bool(rows.isfinite().all()):
            raise TagFileError(f"{path}: damaged: {name} holds {rows.dtype}, or values that are no numbers")
    if result.answers not in ("symbols", "names"):
        raise TagFileError(f"{folder / DETAILS}: damaged: answers is {result.answers!r}")
    # safetensors gives them in an order of its own, another one each time.
    return replace(result, vectors={tag.name: result.vectors[tag.name] for tag in result.template.tags})


def load_model(tags: str | Path | TagFile, backbone: Backbone | BackboneConfig | None = None) -> MarkupModel:
    """Load tags with their backbone, unless one is given; errors as in `MarkupModel.from_tags`."""
    if not isinstance(tags, TagFile):
        tags = read_tags(tags)
    if backbone is None:
        backbone = config_of(tags.backbone)
    if isinstance(backbone, BackboneConfig):
        backbone = Backbone.load(backbone)
    difference = tags.fingerprint.difference(Fingerprint.of(backbone))
    if difference:
        raise TagFileError(
            f"{tags.label}: these tags were made for {tags.backbone['name']!r}, not for {backbone.name!r}: {difference}"
        )
    model = MarkupModel(
        backbone,
        tags.template,
        tags.vectors,
        answers=tags.answers,
        length_normalised=tags.length_normalised,
        chat=tags.chat,
    )
    model.origin = tags
    return model


def _short(folder: Path) -> str:
    """Return how a folder is called in files that travel: without most of the path, which tells of a machine."""
    parts = [part for part in folder.parts if part not in (folder.anchor, ".", "..")]
    home = os.path.expanduser("~")  # noqa: PTH111  (where there is no home, Path raises)
    return "/".join(parts[-1:] if str(folder.parent) == home else parts[-2:]) or "tags"


def _check_backbone(told: dict[str, Any]) -> None:
    """Check the types of what is given to transformers."""
    if not isinstance(told["name"], str) or not isinstance(told["kind"], str):
        raise TypeError("backbone: name and kind are no text")
    if not isinstance(told["revision"], str | None):
        raise TypeError("backbone: revision is no text")
