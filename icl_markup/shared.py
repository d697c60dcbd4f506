"""Models that classifiers share: clones of an estimator, as in a cross-validation, load a backbone once."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from icl_markup.backbone import Backbone
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.tagfile import load_model, read_tags
from icl_markup.template import Template

_models: weakref.WeakValueDictionary[tuple[Any, ...], MarkupModel] = weakref.WeakValueDictionary()
_backbones: weakref.WeakValueDictionary[BackboneConfig, Backbone] = weakref.WeakValueDictionary()
_latest: list[MarkupModel] = []
"""The model asked for last is held: between two folds of a cross-validation no classifier does."""

_lock = Lock()


def load_shared(tags: str | Path | None, config: BackboneConfig | None, template: str | Path, seed: int) -> MarkupModel:
    """Return the model of some tags, or of untrained ones of a template; loaded unless some classifier holds it.

    Args:
        tags: a tag folder, or None.
        config: the backbone, its device and quantisation; an empty name, or None: the tags' own, or the embedded one.
        template: the template of untrained tags.
        seed: their seed.

    Raises:
        TagFileError, BackboneError, TemplateError: something cannot be loaded.
    """
    with _lock:
        wanted = config if config is not None and config.name else replace(config or BackboneConfig(), name="embedded")
        if tags is not None:
            found = read_tags(tags)
            if config is None or not config.name:
                wanted = config_of(found.backbone, device=wanted.device, quantisation=wanted.quantisation)
            state: tuple[Any, ...] = (
                found.tensors_sha256,
                found.template.source,
                found.answers,
                found.length_normalised,
            )
        else:
            state = (Template.load(template).source, seed)
        key = (tags is not None, *state, wanted)
        model = _models.get(key)
        if model is None:
            backbone = _backbones.get(wanted)
            if backbone is None:
                backbone = _backbones[wanted] = Backbone.load(wanted)
            model = MarkupModel(backbone, template, seed=seed) if tags is None else load_model(tags, backbone)
            _models[key] = model
        _latest[:] = [model]
        return model
