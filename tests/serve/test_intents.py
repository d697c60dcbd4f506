"""Labels and examples that change while they are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.errors import PromptError
from icl_markup.intents import Intents, NotSavedError, UnknownLabelError
from icl_markup.server import create_app
from tests.conftest import TEXTS
from tests.serve.asking import NEW, X, Y, detail, labels


def test_intents_are_listed_added_replaced_and_removed(client: TestClient, classifier: MarkupClassifier) -> None:
    found = client.get("/intents").json()
    assert found["none_of_the_above"] is None
    assert {row["label"]: row["examples"] for row in found["intents"]} == {k: v[:2] for k, v in TEXTS.items()}

    body = {"label": "refund", "examples": ["money back", "refund me", "money back"], "description": "wants money"}
    added = client.post("/intents", json=body).json()
    assert added == {"label": "refund", "examples": ["money back", "refund me"], "description": "wants money"}
    more = client.post("/intents", json={"label": " refund ", "examples": ["refund me", "pay me back"]}).json()
    assert more["examples"] == ["money back", "refund me", "pay me back"] and more["description"] == "wants money"
    assert labels(client) == sorted([*TEXTS, "refund"])
    [answer] = client.post("/classify", json={"text": "refund"}).json()["answers"]
    assert "refund" in answer["probabilities"]

    replaced = client.put("/intents", json={"label": "refund", "examples": ["other"], "description": ""}).json()
    assert replaced == {"label": "refund", "examples": ["other"], "description": ""}
    wanted = MarkupClassifier(classifier.tags).fit([*X, "other"], [*Y, "refund"]).predict_proba(NEW)
    answers = client.post("/classify", json={"texts": NEW}).json()["answers"]
    assert np.array([list(one["probabilities"].values()) for one in answers]) == pytest.approx(wanted, abs=1e-6)

    assert client.delete("/intents/refund").json() == {"removed": "refund"}
    assert labels(client) == sorted(TEXTS)
    assert "refund" in detail(client.delete("/intents/refund"), 404)


@pytest.mark.parametrize(
    "label", ["a/b", "/", "..", "a b?c#d%2F", "étiquette", "<label>", "\x01\x1b", "x" * 60, "[MASK]"]
)
def test_a_label_may_be_any_text(client: TestClient, label: str) -> None:
    for _ in range(2):
        assert client.post("/intents", json={"label": label, "examples": ["some text"]}).status_code == 200
        assert label in labels(client)
        [answer] = client.post("/classify", json={"text": label}).json()["answers"]
        assert label in answer["probabilities"]
        assert client.delete("/intents", params={"label": label}).json() == {"removed": label}
    assert labels(client) == sorted(TEXTS)


def test_a_label_with_slashes_is_removed_by_its_path(client: TestClient) -> None:
    client.post("/intents", json={"label": "card/lost/abroad"})
    assert client.delete("/intents/card/lost/abroad").json() == {"removed": "card/lost/abroad"}
    client.post("/intents", json={"label": "card/lost"})
    assert client.delete("/intents/card%2Flost").json() == {"removed": "card/lost"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"label": "", "examples": []}, "at least 1 character"),
        ({"label": "  "}, "empty"),
        ({"label": "none of the above"}, "meaning of its own"),
        ({"label": "word " * 190}, "limit is"),
        ({"label": "a" * 1001}, "1000 characters"),
        ({"label": "a\0"}, "NUL"),
        ({"label": "new", "examples": ["ok", ""]}, "examples: text 1 is empty"),
        ({"label": "new", "examples": [None]}, "examples.0"),
        ({"label": 3}, "label: Input should be a valid string"),
        ({"label": "new", "exmples": []}, "exmples: Extra"),
    ],
)
def test_a_bad_intent_changes_nothing(client: TestClient, body: dict[str, Any], told: str) -> None:
    for method in ("POST", "PUT"):
        assert told in detail(client.request(method, "/intents", json=body), 422)
    assert labels(client) == sorted(TEXTS)


def test_two_labels_stay(client: TestClient) -> None:
    for label in ("weather", "complaint"):
        assert client.delete(f"/intents/{label}").status_code == 200
    assert "two labels" in detail(client.delete("/intents/lost card"), 422)
    assert labels(client) == ["lost card", "opening hours"]
    assert client.post("/classify", json={"text": "hello"}).status_code == 200


def test_labels_that_are_numbers_stay_numbers(model: MarkupModel) -> None:
    classifier = MarkupClassifier(model).fit(["yes", "no"], [1, 0])
    intents = Intents(classifier)
    assert intents.put("2", ["maybe"])["label"] == "2" and classifier.classes_.tolist() == [0, 1, 2]
    intents.put("1", ["sure"])
    assert classifier.classes_.tolist() == [0, 1, 2]
    with pytest.raises(PromptError, match="whole numbers"):
        intents.put("many", [])
    flags = MarkupClassifier(model).fit(["yes", "no"], [True, False])
    with pytest.raises(PromptError, match="cannot be joined"):
        Intents(flags).put("2", [])


def test_changes_are_written_where_that_is_asked_for(classifier: MarkupClassifier, tmp_path: Path) -> None:
    folder = classifier.save(tmp_path / "kept")
    was = (folder / "classifier.json").read_bytes()
    Intents(classifier).put("refund", ["money back"])
    assert (folder / "classifier.json").read_bytes() == was
    Intents(classifier, folder).put("refund", ["pay me"], "wants money")
    kept = json.loads((folder / "classifier.json").read_text())
    assert kept["descriptions"][kept["classes"].index("refund")] == "wants money"
    assert [one["text"] for one in kept["demonstrations"]][-2:] == ["money back", "pay me"]


def test_a_change_that_cannot_be_written_is_taken_back(classifier: MarkupClassifier, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    intents = Intents(classifier, tmp_path / "file")
    rows, before = intents.rows(), classifier.predict_proba(NEW)
    with pytest.raises(NotSavedError, match="nothing was changed"):
        intents.put("refund", ["money back"], "wants money")
    with pytest.raises(NotSavedError):
        intents.remove("weather")
    with pytest.raises(UnknownLabelError):
        intents.remove("no such label")
    assert intents.rows() == rows and classifier.descriptions is None
    assert (classifier.predict_proba(NEW) == before).all()
    with TestClient(create_app(classifier, save=tmp_path / "file")) as client:
        assert "cannot be written" in detail(client.delete("/intents/weather"), 500)
