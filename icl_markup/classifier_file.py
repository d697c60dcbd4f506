"""Classifier folders: ``classifier.json`` (labels, demonstrations, parameters, calibration) and, beside it, the tags.

A folder holds nothing that is executed and names the backbone, which is not in it. It is written whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from icl_markup.backbone import Backbone
from icl_markup.calibration import Calibration
from icl_markup.chat import ChatFrame
from icl_markup.errors import ConfigError, MarkupError, TagFileError
from icl_markup.files import read_details, replace_folder, sealed
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.quantisation import Quantisation
from icl_markup.tagfile import save_model
from icl_markup.tasks import NONE_OF_THE_ABOVE
from icl_markup.template import Template

if TYPE_CHECKING:
    from icl_markup.classifier import MarkupClassifier

FORMAT = 1
FILE, TAGS = "classifier.json", "tags"
FORMAT_IN_CHAT = 2
"""The format of classifiers whose template has no tags and stands in a chat."""

_ELSEWHERE = ("tags", "backbone", "template", "chat", "device", "quantisation", "descriptions")
"""Parameters that are not written as they are: the tags lie in a folder of their own, the device is the reader's."""


def save_classifier(classifier: MarkupClassifier, folder: str | Path) -> Path:
    """Write a fitted classifier; see `MarkupClassifier.save`."""
    folder = Path(folder)
    if callable(classifier.retriever):
        raise ConfigError(
            "retriever is a function, which cannot be written as data; name one, or give it after loading"
        )
    check_place(folder)
    model = classifier.fitted_model()
    inside = classifier.labels()
    descriptions = classifier.descriptions or {}
    details = {
        "format": FORMAT,
        "backbone": {
            "name": model.backbone.name,
            "revision": model.backbone.revision,
            "quantisation": model.backbone.quantisation,
        },
        "template": None if model.table is not None else _template_of(model),
        "parameters": {k: v for k, v in classifier.get_params(deep=False).items() if k not in _ELSEWHERE},
        "classes": inside,
        "descriptions": [str(descriptions.get(label, "")) for label in inside],
        "demonstrations": [
            {"text": text, "class": answer} for text, answer in zip(classifier.texts_, classifier.labels_, strict=True)
        ],
        "calibration": classifier.calibration_.to_json(),
    }
    if model.table is None and model.chat is not None:
        details["format"] = FORMAT_IN_CHAT
    try:
        content = sealed(details, _plain)
    except TypeError as error:
        raise ConfigError(f"a parameter of the classifier cannot be written as data: {error}") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            files = {FILE: content}
            if model.table is not None:
                tags = save_model(model, part / TAGS)
                files |= {f"{TAGS}/{file.name}": file.read_bytes() for file in sorted(tags.iterdir())}
            replace_folder(folder, files)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise TagFileError(f"{folder}: cannot write the classifier: {error}") from error
    return folder


def check_place(folder: str | Path) -> None:
    """Check that a classifier may be written there, in place of at most another one.

    Raises:
        TagFileError: it is a file, or a folder with anything else in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise TagFileError(f"{folder}: is a file; give a folder")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    others = found if FILE not in found else found - {FILE, TAGS}
    if others:
        raise TagFileError(f"{folder}: holds {min(others)!r}, no part of a classifier; choose an empty or a new folder")


def load_classifier(
    folder: str | Path,
    device: str = "auto",
    batch_tokens: int | None = None,
    quantisation: Quantisation = "auto",
) -> MarkupClassifier:
    """Read a classifier folder; see `MarkupClassifier.load`."""
    from icl_markup.classifier import MarkupClassifier

    folder = Path(folder)
    path = folder / FILE
    details = read_details(path, (FORMAT, FORMAT_IN_CHAT), "classifier")
    try:
        parameters = dict(details["parameters"])
        known = set(MarkupClassifier().get_params(deep=False)) - set(_ELSEWHERE)
        if not set(parameters) <= known:
            raise ValueError(f"unknown parameter {min(set(parameters) - known)!r}")
        backbone, template = details["backbone"], details["template"]
        classes = [_label(value) for value in details["classes"]]
        descriptions = {c: str(d) for c, d in zip(classes, details["descriptions"], strict=True) if d}
        texts = [str(one["text"]) for one in details["demonstrations"]]
        answers = [classes[_index(one["class"], len(classes))] for one in details["demonstrations"]]
        calibration = Calibration.from_json(details["calibration"])
        config = config_of(backbone, device=device, quantisation=quantisation)
        if template is None and details["format"] == FORMAT_IN_CHAT:
            raise ValueError(f"format {FORMAT_IN_CHAT} without the template that stands in a chat")
        if template is not None:
            chat = ChatFrame.from_json(template["chat"]) if details["format"] == FORMAT_IN_CHAT else None
            template = {key: template[key] for key in ("source", "answers", "length_normalised")} | {"chat": chat}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, MarkupError):
            raise
        raise TagFileError(f"{path}: damaged: {type(error).__name__} {error}") from error
    if batch_tokens is not None:
        parameters["batch_tokens"] = batch_tokens
    tags: Any = folder / TAGS if template is None else _plain_model(config, **template)
    classifier = MarkupClassifier(
        tags, descriptions=descriptions or None, device=device, quantisation=quantisation, **parameters
    )
    try:
        classifier.fit(texts, answers, classes=classes)
    except MarkupError as error:
        raise TagFileError(f"{folder}: {error}") from error
    classifier.calibration_ = calibration
    return classifier


def _template_of(model: MarkupModel) -> dict[str, Any]:
    return {
        "source": model.template.source,
        "answers": model.answers,
        "length_normalised": model.length_normalised,
        **({} if model.chat is None else {"chat": model.chat.to_json()}),
    }


def _plain_model(
    config: BackboneConfig, source: str, answers: Any, length_normalised: bool, chat: ChatFrame | None
) -> MarkupModel:
    template = Template.parse(str(source), "saved")
    return MarkupModel(
        Backbone.load(config), template, answers=answers, length_normalised=bool(length_normalised), chat=chat
    )


def _index(value: Any, count: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise ValueError(f"a demonstration has class {value!r} of {count}")
    return value


def _label(value: Any) -> Any:
    if not isinstance(value, (str, int)) or value == NONE_OF_THE_ABOVE:
        raise ValueError(f"a class is {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} of type {type(value).__name__}")
