"""A tiny model, a classifier on it, a client that asks it, and its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.server import create_app
from tests.conftest import tiny_backbone
from tests.serve.asking import X, Y


@pytest.fixture(scope="module")
def model() -> MarkupModel:
    return MarkupModel(tiny_backbone("bert"))


@pytest.fixture
def classifier(model: MarkupModel) -> MarkupClassifier:
    return MarkupClassifier(model).fit(X, Y)


@pytest.fixture
def client(classifier: MarkupClassifier) -> Iterator[TestClient]:
    with TestClient(create_app(classifier), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's folder on a tiny backbone."""
    place = tmp_path_factory.mktemp("serve")
    source = tiny_backbone("bert")
    source.model.save_pretrained(place / "model")
    source.tokenizer.save_pretrained(place / "model")
    return MarkupClassifier(backbone=str(place / "model")).fit(X, Y).save(place / "classifier")
