"""What no request passes: large and slow bodies, wrong keys, other hosts, a full queue."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from threading import Event
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from icl_markup import MarkupClassifier
from icl_markup.errors import ConfigError
from icl_markup.server import WARM_UP, create_app
from tests.conftest import TEXTS
from tests.serve.asking import KEY, asked, detail, labels, run


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


def held(classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[FastAPI, Event]:
    """Return an application whose model holds every text but the first until the event is set."""
    gate = Event()
    whole = MarkupClassifier.predict_proba

    def waits(self: MarkupClassifier, texts: Any) -> Any:
        assert list(texts) == [WARM_UP] or gate.wait(60)
        return whole(self, texts)

    monkeypatch.setattr(MarkupClassifier, "predict_proba", waits)
    return create_app(classifier, most_batch=1, batch_wait_ms=0, **options), gate


def test_a_full_queue_refuses_before_anything_is_read(
    classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, gate = held(classifier, monkeypatch, most_waiting=2)
    body = b'{"text": "rain"}'

    async def unread() -> Any:
        raise AssertionError("the body was read")

    async def full() -> None:
        # One is at work before the others come, which then wait: together they would not all come in.
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.ensure_future(asked(app, "POST", "/classify", body)))
            await asyncio.sleep(0.5)
        assert app.state.batcher.full
        for path in ("/classify", "/prompt"):
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {"type": "http", "path": path, "method": "POST", "headers": [], "query_string": b""}
            await app(scope, unread, send)
            assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
            assert b"try again" in sent[1]["body"]
        assert (await asked(app, "GET", "/healthz"))[0] == 200
        assert b'path="/prompt",status="503"} 1.0' in (await asked(app, "GET", "/metrics"))[2]
        gate.set()
        assert [(await task)[0] for task in tasks] == [200] * 3
        assert (await asked(app, "POST", "/classify", body))[0] == 200

    run(app, full)


def test_requests_that_come_together_do_not_all_come_in(
    classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, gate = held(classifier, monkeypatch, most_waiting=2)
    read = 0

    async def one() -> int:
        status = 0

        async def receive() -> dict[str, Any]:
            nonlocal read
            read += 1
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b'{"text": "rain"}', "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "path": "/classify", "method": "POST", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        return status

    async def many() -> Counter[int]:
        asyncio.get_running_loop().call_later(0.5, gate.set)
        return Counter(await asyncio.gather(*(one() for _ in range(50))))

    statuses = run(app, many)
    assert read <= 3, "as many as may wait, and the one that is answered"
    assert set(statuses) == {200, 503} and 2 <= statuses[200] <= 3


def test_a_request_cancelled_at_the_servers_end_is_told_so(
    classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, gate = held(classifier, monkeypatch)

    async def ending() -> tuple[int, bytes, int]:
        async with app.router.lifespan_context(app):
            given_up, cut = (
                asyncio.ensure_future(asked(app, "POST", "/classify", b'{"text": "rain"}')) for _ in range(2)
            )
            for _ in range(3000):
                if app.state.batcher.working and app.state.batcher.waiting:
                    break
                await asyncio.sleep(0.01)
            cut.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cut
            count = app.state.batcher.give_up()
            status, _, body = await given_up
        assert app.state.batcher.working, "nothing waited for the model"
        gate.set()
        return status, body, count

    status, body, count = asyncio.run(asyncio.wait_for(ending(), 30))
    assert status == 503 and b"shutting down" in body and count == 1
