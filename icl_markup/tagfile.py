"""Tag folders: ``tags.safetensors`` (one tensor a tag), ``tags.json`` (everything else) and a model card.

A folder is a few kilobytes, holds nothing that is executed, and is written whole or not at all. It names the
backbone that its tags were made for, and loading it on another one is an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, float32

from icl_markup.backbone import Backbone
from icl_markup.card import model_card
from icl_markup.errors import TagFileError, TemplateError
from icl_markup.files import read_details, read_regular, replace_folder, sealed
from icl_markup.fingerprint import Fingerprint
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.template import Template

FORMAT = 1
_TENSORS, _DETAILS, _CARD = "tags.safetensors", "tags.json", "README.md"
_MOST_TENSORS = 2**30
"""Tensors of more bytes than this are not read; the widest tags of the widest model take a hundredth of it."""


@dataclass(frozen=True)
class TagFile:
    """The content of a tag folder.

    Attributes:
        folder: where it was read.
        vectors: rows by tag name, each of shape (width, embedding width), fp32.
        template: the template that the tags were warmed up in.
        backbone: the backbone's name, revision, kind and embedding width.
        fingerprint: that of the backbone.
        answers: symbols or names.
        length_normalised: whether names are scored by the mean log-probability of their tokens.
        training: the summary of the warm-up; empty for untrained tags.
        tensors_sha256: the checksum of ``tags.safetensors``.
    """

    folder: Path
    vectors: dict[str, Tensor]
    template: Template
    backbone: dict[str, Any]
    fingerprint: Fingerprint
    answers: str
    length_normalised: bool
    training: dict[str, Any]
    tensors_sha256: str = ""


def save_model(model: MarkupModel, folder: str | Path, training: dict[str, Any] | None = None) -> Path:
    """Write a model's tags; see `MarkupModel.save`."""
    if model.table is None:
        raise TagFileError(f"template {model.template.name!r} has no tags to save")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise TagFileError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _DETAILS).exists():
        raise TagFileError(f"{folder}: holds other files and no tags; choose an empty or a new folder")
    backbone = model.backbone
    tensors = save_tensors(model.table.vectors(), metadata={"format": "icl-markup"})
    details = {
        "format": FORMAT,
        "tags": [{"name": t.name, "width": t.width, "description": t.description} for t in model.template.tags],
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "backbone": {
            "name": backbone.name,
            "revision": backbone.revision,
            "kind": backbone.kind,
            "embedding_width": backbone.width,
        },
        "fingerprint": Fingerprint.of(backbone).to_json(),
        "template": {"name": Path(model.template.name).stem, "source": model.template.source},
        "answers": model.answers,
        "length_normalised": model.length_normalised,
        "training": training or {},
    }
    files = {
        _TENSORS: tensors,
        _DETAILS: sealed(details),
        _CARD: model_card(details, len(tensors)).encode(),
    }
    try:
        replace_folder(folder, files)
    except OSError as error:
        raise TagFileError(f"{folder}: cannot write the tags: {error}") from error
    return folder


def read_tags(folder: str | Path) -> TagFile:
    """Read and check a tag folder.

    Raises:
        TagFileError: a file is missing, damaged or of a later format, or the files contradict each other.
    """
    folder = Path(folder)
    details = read_details(folder / _DETAILS, FORMAT, "tag")
    path = folder / _TENSORS
    try:
        raw = read_regular(path, _MOST_TENSORS)
    except OSError as error:
        raise TagFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if hashlib.sha256(raw).hexdigest() != details["tensors_sha256"]:
            raise TagFileError(f"{path}: damaged: its content differs from what {_DETAILS} says (SHA-256)")
        vectors = load_tensors(raw)
        template = Template.parse(str(details["template"]["source"]), str(details["template"]["name"]))
        result = TagFile(
            folder,
            vectors,
            template,
            dict(details["backbone"]),
            Fingerprint.from_json(details["fingerprint"]),
            str(details["answers"]),
            bool(details["length_normalised"]),
            dict(details["training"]),
            str(details["tensors_sha256"]),
        )
        declared = {str(t["name"]): int(t["width"]) for t in details["tags"]}
        width = int(result.backbone["embedding_width"])
        _check_backbone(result.backbone)
    except SafetensorError as error:
        raise TagFileError(f"{path}: damaged: {error}") from error
    except TemplateError as error:
        raise TagFileError(f"{folder / _DETAILS}: damaged template: {error}") from error
    except (KeyError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, TagFileError):
            raise
        raise TagFileError(f"{folder / _DETAILS}: damaged: {type(error).__name__} {error}") from error
    expected = {name: (rows, width) for name, rows in declared.items()}
    found = {name: tuple(value.shape) for name, value in vectors.items()}
    if found != expected or {t.name: t.width for t in template.tags} != declared:
        raise TagFileError(f"{path}: damaged: holds {found}, but {_DETAILS} lists {expected}")
    for name, rows in vectors.items():
        if rows.dtype != float32 or not bool(rows.isfinite().all()):
            raise TagFileError(f"{path}: damaged: {name} holds {rows.dtype}, or values that are no numbers")
    if result.answers not in ("symbols", "names"):
        raise TagFileError(f"{folder / _DETAILS}: damaged: answers is {result.answers!r}")
    return result


def load_model(folder: str | Path, backbone: Backbone | BackboneConfig | None = None) -> MarkupModel:
    """Load tags with their backbone; see `MarkupModel.from_tags`."""
    tags = read_tags(folder)
    if backbone is None:
        backbone = BackboneConfig(str(tags.backbone["name"]), revision=tags.backbone["revision"])
    if isinstance(backbone, BackboneConfig):
        backbone = Backbone.load(backbone)
    difference = tags.fingerprint.difference(Fingerprint.of(backbone))
    if difference:
        raise TagFileError(
            f"{folder}: these tags were made for {tags.backbone['name']!r}, not for {backbone.name!r}: {difference}"
        )
    answers: Any = tags.answers
    return MarkupModel(backbone, tags.template, tags.vectors, answers=answers, length_normalised=tags.length_normalised)


def _check_backbone(told: dict[str, Any]) -> None:
    """Check the types of what is given to transformers."""
    if not isinstance(told["name"], str) or not isinstance(told["kind"], str):
        raise TypeError("backbone: name and kind are no text")
    if not isinstance(told["revision"], str | None):
        raise TypeError("backbone: revision is no text")
