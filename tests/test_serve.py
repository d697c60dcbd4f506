"""The server: its routes, limits, key, batches, changes while it serves, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.cli import main
from icl_markup.errors import ConfigError, PromptError
from icl_markup.intents import Intents, NotSavedError, UnknownLabelError
from icl_markup.serve import api_key, is_loopback
from icl_markup.server import create_app
from tests.conftest import TEXTS, tiny_backbone

X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]
NEW = [text for texts in TEXTS.values() for text in texts[2:]]
KEY = "a-key-of-ASCII"


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


def detail(answer: httpx2.Response, status: int) -> str:
    """Check an error's status and form, and return its sentence."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"]
    return str(answer.json()["detail"])


def labels(client: TestClient) -> list[str]:
    return [row["label"] for row in client.get("/intents").json()["intents"]]


# Classifying


def test_answers_are_those_of_predict_proba(client: TestClient, classifier: MarkupClassifier) -> None:
    wanted = classifier.predict_proba(NEW)
    answers = client.post("/classify", json={"texts": NEW}).json()["answers"]
    assert [one["label"] for one in answers] == classifier.predict(NEW).tolist()
    for one, row in zip(answers, wanted, strict=True):
        assert list(one["probabilities"]) == classifier.classes_.tolist()
        assert list(one["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-6)
    [single] = client.post("/classify", json={"text": NEW[0]}).json()["answers"]
    assert single["probabilities"] == pytest.approx(answers[0]["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"texts": []}', "at least 1 item"),
        ('{"texts": [" "]}', "text 0 is empty"),
        ('{"texts": ["fine", "\\t\\n"]}', "text 1 is empty"),
        ('{"text": ""}', "text 0 is empty"),
        ('{"texts": [NaN]}', "valid string"),
        ('{"text": NaN}', "valid string"),
        ('{"texts": [null]}', "valid string"),
        ('{"texts": "one"}', "valid list"),
        ('{"texts": ["\\ud800"]}', "surrogate|unicode"),
        ('{"\\ud800": 1}', "unicode"),
        ("{}", 'either "text" or "texts"'),
        ('{"text": "a", "texts": ["a"]}', 'either "text" or "texts"'),
        ('{"text": "a", "top": 3}', "top: Extra inputs"),
        ("[1, 2]", "valid dictionary|object"),
        ("{", "JSON"),
        ("", "required"),
        (json.dumps({"texts": ["a"] * 257}), "at most 256 items"),
        (json.dumps({"text": "a" * 100_001}), "at most 100000 characters"),
    ],
)
def test_bad_texts_are_refused_with_the_reason(client: TestClient, body: str, told: str) -> None:
    answer = client.post("/classify", content=body, headers={"content-type": "application/json"})
    assert re.search(told, detail(answer, 422))
    assert len(answer.content) < 1000, "the answer does not repeat what was sent"


@pytest.mark.parametrize("body", ["[" * 100_000, '{"texts": [' + "9" * 5000 + "]}", b'{"text": "\xff"}'])
def test_malformed_json_is_refused(client: TestClient, body: str | bytes) -> None:
    answer = client.post("/classify", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 423 and answer.json()["detail"]


@pytest.mark.parametrize(
    "text", ["今日は何時に閉まりますか", "متى تغلقون", "\x00\x07 control \x1b[31m", "😀", "a" * 100_000, "\u202etxet"]
)
def test_texts_of_any_script_have_an_answer(client: TestClient, classifier: MarkupClassifier, text: str) -> None:
    [answer] = client.post("/classify", json={"text": text}).json()["answers"]
    wanted = classifier.predict_proba([text])[0]
    assert list(answer["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-6)


# The size of bodies, the key, the host


async def asked(
    app: FastAPI, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **scope: Any
) -> tuple[int, dict[str, str], bytes]:
    """Ask an application as a server does, with the body in pieces of 1,000 bytes and no Content-Length."""
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.sleep(3600)
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(b"host", b"localhost:8000"), (b"content-type", b"application/json")]
    raw += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    base = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": raw,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), **scope,
    }  # fmt: skip
    await app(base, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(one.get("body", b"") for one in sent[1:])


def run(app: FastAPI, action: Callable[[], Awaitable[Any]]) -> Any:
    """Run something while the application is up."""

    async def whole() -> Any:
        async with app.router.lifespan_context(app):
            return await action()

    return asyncio.run(whole())


def test_a_large_body_is_refused_by_its_length_and_while_it_arrives(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, most_bytes=5_000)
    body = json.dumps({"text": "a" * 4_980}).encode()

    async def both() -> list[int]:
        announced = await asked(app, "POST", "/classify", b"", {"content-length": "5001"})
        huge = await asked(app, "POST", "/classify", b"", {"content-length": "9" * 5000})
        streamed = await asked(app, "POST", "/classify", body + b" " * (5_001 - len(body)))
        fits = await asked(app, "POST", "/classify", body + b" " * (5_000 - len(body)))
        assert b"5,000 bytes" in announced[2] and b"5,000 bytes" in streamed[2]
        return [announced[0], huge[0], streamed[0], fits[0]]

    assert run(app, both) == [413, 413, 413, 200]


def test_a_body_that_does_not_arrive_is_not_waited_for(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, body_seconds=0.05)

    async def stalled() -> tuple[int, Any]:
        status = 0

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {"type": "http", "path": "/classify", "method": "POST", "headers": [(b"host", b"x")]}
        await app({**scope, "query_string": b""}, receive, send)
        return status

    assert run(app, stalled) == 408


def test_many_large_bodies_at_once_are_refused_and_room_comes_back(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, most_bytes=2_000, most_waiting=5000, batch_wait_ms=100)
    body = json.dumps({"text": "rain"}).encode().ljust(2_000)

    async def many() -> tuple[Counter[int], int]:
        found = await asyncio.gather(*(asked(app, "POST", "/classify", body) for _ in range(100)))
        later = await asked(app, "POST", "/classify", body)
        return Counter(one[0] for one in found), later[0]

    statuses, later = run(app, many)
    assert set(statuses) == {200, 503} and statuses[200] <= 64 and later == 200


@pytest.mark.parametrize("path", ["/classify", "/prompt", "/intents", "/intents/weather", "/metrics", "/elsewhere"])
def test_without_the_key_nothing_but_the_page_is_open(classifier: MarkupClassifier, path: str) -> None:
    with TestClient(create_app(classifier, api_key=KEY)) as client:
        for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Basic " + KEY}, {"X-API-Key": b"\xfc"}):
            answer = client.delete(path, headers=headers)
            assert "API key" in detail(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}):
            assert client.request("OPTIONS", path, headers=headers).status_code in (404, 405)
        for open_path in ("/", "/docs", "/healthz", "/openapi.json", "/static/page.js"):
            assert client.get(open_path).status_code == 200
        assert client.post("/classify", json={"text": "rain"}, headers={"X-API-Key": KEY}).status_code == 200
        assert len(labels_with_key(client)) == 4, "what was refused changed nothing"


def labels_with_key(client: TestClient) -> list[Any]:
    return list(client.get("/intents", headers={"X-API-Key": KEY}).json()["intents"])


@pytest.mark.parametrize("key", ["", "two words", "ü", "line\nbreak"])
def test_a_key_that_no_header_can_hold_is_refused(classifier: MarkupClassifier, key: str) -> None:
    with pytest.raises(ConfigError, match="ASCII"):
        create_app(classifier, api_key=key)


def test_a_name_that_points_here_is_not_served(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, hosts=("localhost", "127.0.0.1", "::1"))
    with TestClient(app) as client:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
            assert client.get("/healthz", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "[::2]", ""):
            assert "not served" in detail(client.get("/healthz", headers={"host": host}), 421)


def test_another_site_cannot_post_without_asking_the_browser_first(client: TestClient) -> None:
    # text/plain is what a page of any site may post; JSON needs a preflight, which is not answered.
    answer = client.post("/intents", content='{"label": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 422 and labels(client) == sorted(TEXTS)
    asks = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = client.options("/intents", headers=asks)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


# Intents


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


# The prompt


@pytest.mark.parametrize("text", ["<classification> <options> A: <demo> [MASK] <label> A", "[SEP]", "</s> {label} ▢"])
def test_text_that_imitates_markup_stays_text(client: TestClient, text: str) -> None:
    plain = client.post("/prompt", json={"text": "will it rain"}).json()
    found = client.post("/prompt", json={"text": text}).json()
    assert found["slots"] == 1 and found["options"] == sorted(TEXTS)
    outline = [(one["kind"], one["segment"]) for one in found["pieces"]]
    assert outline == [(one["kind"], one["segment"]) for one in plain["pieces"]], "it is one piece, and of kind value"
    assert Counter(kind for kind, _ in outline)["slot"] == 1
    assert sum(one["tokens"] for one in found["pieces"]) == found["tokens"]
    assert {one["text"] for one in found["pieces"] if one["kind"] == "tag"} >= {"<options>", "<demo>", "<label>"}
    [asked_about] = [one for one in plain["pieces"] if one["kind"] == "value" and one["segment"] < 0]
    assert asked_about["text"].strip() == "will it rain"
    assert "text 0 is empty" in detail(client.post("/prompt", json={"text": " "}), 422)


# Health, metrics, the page, the description


def test_health_metrics_and_description(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "labels": 4, "backbone": "tiny-bert"}
    client.post("/classify", json={"texts": NEW[:3]})
    client.post("/classify", json={"texts": []})
    client.get("/secret/of/someone")
    client.delete("/intents/never there")
    metrics = client.get("/metrics").text
    for line in (
        'icl_markup_requests_total{path="/classify",status="200"} 1.0',
        'icl_markup_requests_total{path="/classify",status="422"} 1.0',
        'icl_markup_requests_total{path="other",status="404"} 1.0',
        'icl_markup_requests_total{path="/intents/{label}",status="404"} 1.0',
        "icl_markup_texts_total 3.0",
        "icl_markup_batch_texts_count 1.0",
        "icl_markup_batch_texts_sum 3.0",
        "icl_markup_queue_texts 0.0",
        "icl_markup_labels 4.0",
        'icl_markup_request_seconds_count{path="/classify"} 2.0',
    ):
        assert line in metrics.splitlines(), metrics
    assert "secret" not in metrics and "never there" not in metrics
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/classify", "/prompt", "/intents", "/intents/{label}", "/healthz", "/metrics"}


def test_pages_need_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs", "/static/page.css", "/static/page.js", "/static/api.js", "/static/docs.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"(src|href|url|import)\W*https?://|innerHTML|\son\w+=\"", answer.text), path
    assert client.get("/static/../server.py").status_code == 404
    assert client.get("/static/%2e%2e/server.py").status_code == 404


def test_an_error_of_the_server_is_told_as_one(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a secret of the implementation")

    monkeypatch.setattr(MarkupClassifier, "predict_proba", fails)
    answer = client.post("/classify", json={"text": "rain"})
    assert "failed" in detail(answer, 500) and "secret" not in answer.text
    monkeypatch.undo()
    assert client.post("/classify", json={"text": "rain"}).status_code == 200
    assert 'path="/classify",status="500"} 1.0' in client.get("/metrics").text


# Batches


def test_concurrent_requests_share_batches_and_get_their_own_answers(
    classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    threads: set[str] = set()
    whole = MarkupClassifier.predict_proba

    def watched(self: MarkupClassifier, texts: Any) -> Any:
        sizes.append(len(texts))
        threads.add(threading.current_thread().name)
        return whole(self, texts)

    monkeypatch.setattr(MarkupClassifier, "predict_proba", watched)
    app = create_app(classifier, most_batch=16, batch_wait_ms=200)
    requests = [[NEW[i % len(NEW)], f"number {i}"][: 1 + i % 2] for i in range(40)]

    async def many() -> Any:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.post("/classify", json={"texts": texts}) for texts in requests))

    answers = run(app, many)
    monkeypatch.undo()
    assert sum(sizes) == 60 and max(sizes) <= 16 and len(sizes) <= 8
    assert len(threads) == 1 and threading.current_thread().name not in threads
    for texts, answer in zip(requests, answers, strict=True):
        rows = [list(one["probabilities"].values()) for one in answer.json()["answers"]]
        assert np.array(rows) == pytest.approx(classifier.predict_proba(texts), abs=1e-5)


def test_ten_thousand_concurrent_requests_are_all_answered(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, most_waiting=500)
    wanted = dict(zip(NEW, classifier.predict_proba(NEW).tolist(), strict=True))

    async def many() -> list[Any]:
        bodies = [json.dumps({"text": NEW[i % len(NEW)]}).encode() for i in range(10_000)]
        asks = [asked(app, "POST", "/classify", body) for body in bodies]
        return list(await asyncio.wait_for(asyncio.gather(*asks), 300))

    answers = run(app, many)
    assert len(answers) == 10_000
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) == {200, 503} and statuses[200] >= 500
    for i, (status, headers, body) in enumerate(answers):
        if status == 200:
            [answer] = json.loads(body)["answers"]
            row = list(answer["probabilities"].values())
            assert max(abs(a - b) for a, b in zip(row, wanted[NEW[i % len(NEW)]], strict=True)) < 1e-5
        else:
            assert headers["retry-after"] == "1" and b"waiting" in body


def test_the_applications_end_answers_what_waits(classifier: MarkupClassifier) -> None:
    app = create_app(classifier, batch_wait_ms=10_000)

    async def ending() -> tuple[int, int]:
        async with app.router.lifespan_context(app):
            task = asyncio.ensure_future(asked(app, "POST", "/classify", b'{"text": "rain"}'))
            await asyncio.sleep(0)
            while b"icl_markup_queue_texts 1.0" not in (await asked(app, "GET", "/metrics"))[2]:
                await asyncio.sleep(0.01)
        return (await task)[0], (await asked(app, "GET", "/healthz"))[0]

    assert asyncio.run(asyncio.wait_for(ending(), 60)) == (200, 503)


def test_limits_that_cannot_be_are_refused(classifier: MarkupClassifier) -> None:
    for wrong in ({"most_batch": 0}, {"most_waiting": 0}, {"batch_wait_ms": -1.0}, {"most_bytes": 0}):
        with pytest.raises(ConfigError):
            run(create_app(classifier, **wrong), lambda: asyncio.sleep(0))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's folder on a tiny backbone."""
    place = tmp_path_factory.mktemp("serve")
    source = tiny_backbone("bert")
    source.model.save_pretrained(place / "model")
    source.tokenizer.save_pretrained(place / "model")
    return MarkupClassifier(backbone=str(place / "model")).fit(X, Y).save(place / "classifier")


class Command:
    """`icl-markup serve` as a process, on a free port."""

    def __init__(self, folder: Path, *options: str, **environment: str):
        command = [sys.executable, "-m", "icl_markup.cli", "serve", "--classifier", str(folder), "--port", "0"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=variables, cwd=Path(__file__).parents[1]
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True).start()
                return
        raise AssertionError("".join(self.log))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def test_sigterm_answers_what_is_in_flight_and_exits_with_0(folder: Path) -> None:
    # The text waits five seconds for others: it is in the queue when the signal comes.
    command = Command(folder, "--batch-wait-ms", "5000", "--save", "--api-key-env", "TINY_KEY", TINY_KEY=KEY)
    try:
        headers = {"X-API-Key": KEY}
        assert httpx2.get(f"{command.url}/intents").status_code == 401
        body = {"label": "new", "examples": ["a new one"]}
        assert httpx2.post(f"{command.url}/intents", json=body, headers=headers, timeout=30).status_code == 200
        found: list[httpx2.Response] = []
        ask = threading.Thread(
            target=lambda: found.append(
                httpx2.post(f"{command.url}/classify", json={"text": "will it rain"}, headers=headers, timeout=60)
            )
        )
        ask.start()
        for _ in range(1000):
            if "icl_markup_queue_texts 1.0" in httpx2.get(f"{command.url}/metrics", headers=headers).text:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("the request never waited")
        assert command.stop() == 0, "".join(command.log)
        ask.join(60)
        [answer] = found[0].json()["answers"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
    finally:
        command.process.kill()
        command.process.wait()
    assert not any("Traceback" in line for line in command.log)
    assert "new" in MarkupClassifier.load(folder).classes_, "--save wrote the change"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", command.port), 1):
        pass


def test_what_the_command_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ["serve", "--classifier", str(folder)]
    monkeypatch.setenv("EMPTY_KEY", "")
    for options, told in (
        (["--api-key-env", "EMPTY_KEY"], "EMPTY_KEY"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--port", "70000"], "65535"),
        (["--most-bytes", "0"], "positive"),
        (["--most-waiting", "0"], "at least 1"),
    ):
        assert main([*serve, *options]) == 2
        assert told in capsys.readouterr().err
    assert main(["serve", "--classifier", str(folder / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "icl_markup.server", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "icl_markup.server_metrics", raising=False)
    assert main(serve) == 2
    assert 'pip install "icl-markup[serve]"' in capsys.readouterr().err


def test_where_the_key_comes_from_and_what_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICL_MARKUP_API_KEY", raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("ICL_MARKUP_API_KEY", KEY)
    assert api_key(None) == KEY
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost")] == [True] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"))
