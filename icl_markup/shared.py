"""Models that classifiers share: clones of an estimator, as in a cross-validation, load a backbone once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from icl_markup.answers import AUTO
from icl_markup.backbone import Backbone
from icl_markup.chat import ChatConfig
from icl_markup.composition import composed
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.models import DEFAULT
from icl_markup.tagfile import load_model
from icl_markup.template import Template

Tags = str | Path | Sequence[str | Path]
"""A tag folder, a hub name, or a list of them."""

_models: weakref.WeakValueDictionary[tuple[Any, ...], MarkupModel] = weakref.WeakValueDictionary()
_backbones: weakref.WeakValueDictionary[BackboneConfig, Backbone] = weakref.WeakValueDictionary()
_latest: list[MarkupModel] = []
"""The model asked for last is held: between two folds of a cross-validation no classifier does."""

_lock = Lock()


def load_shared(
    tags: Tags | None,
    config: BackboneConfig | None,
    template: str | Path | None,
    seed: int,
    chat: ChatConfig | None = None,
) -> MarkupModel:
    """Return the model of some tags, or of untrained ones of a template; loaded unless some classifier holds it.

    Args:
        tags: a tag folder, a hub name, or a list of them; or None.
        config: the backbone, its device and quantisation; an empty name, or None: the tags' own, or the default one.
        template: the template; None: that of the tags, or the default markup.
        seed: the seed of untrained tags.
        chat: the chat of untrained tags; others bring their own along.

    Raises:
        TagFileError, BackboneError, TemplateError: something cannot be loaded.
    """
    with _lock:
        wanted = config if config is not None and config.name else replace(config or BackboneConfig(), name=DEFAULT)
        found = None if tags is None else composed(tags, template=template)
        if found is not None:
            if config is None or not config.name:
                wanted = config_of(found.backbone, device=wanted.device, quantisation=wanted.quantisation)
            state: tuple[Any, ...] = (
                found.tensors_sha256,
                found.template.source,
                found.answers,
                found.length_normalised,
                found.commit,
                found.chat,
            )
        else:
            source = Template.load(template).source if template else AUTO
            state = (source, seed, repr(chat or ChatConfig()))
        key = (tags is not None, *state, wanted)
        model = _models.get(key)
        if model is None:
            backbone = _backbones.get(wanted)
            if backbone is None:
                backbone = _backbones[wanted] = Backbone.load(wanted)
            if found is None:
                model = MarkupModel(backbone, template or AUTO, seed=seed, chat=chat)
            else:
                model = load_model(found, backbone)
            _models[key] = model
        _latest[:] = [model]
        return model
