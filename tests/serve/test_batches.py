"""Requests that are answered together, and an application's end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

import httpx2
import numpy as np
import pytest

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.errors import ConfigError
from icl_markup.server import create_app
from tests.serve.asking import NEW, X, Y, asked, run


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

    app = create_app(classifier, most_batch=16, batch_wait_ms=200)
    requests = [[NEW[i % len(NEW)], f"number {i}"][: 1 + i % 2] for i in range(40)]

    async def many() -> Any:
        monkeypatch.setattr(MarkupClassifier, "predict_proba", watched)  # the first text of all was asked before
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


def test_stored_texts_are_embedded_before_requests_are_taken(
    model: MarkupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = MarkupClassifier(model, demos=2, options=2).fit(X * 8, Y * 8)
    seen: list[int] = []
    whole = MarkupClassifier.predict_proba
    health: list[int] = []

    def watched(self: MarkupClassifier, texts: Any) -> Any:
        found = whole(self, texts)
        seen.append(len(texts))
        return found

    monkeypatch.setattr(MarkupClassifier, "predict_proba", watched)
    app = create_app(many)

    async def ready() -> None:
        health.append((await asked(app, "GET", "/healthz"))[0])
        assert seen == [1]

    run(app, ready)
    assert health == [200]


def test_a_classifier_that_cannot_answer_is_not_served(
    classifier: MarkupClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ConfigError("no such encoder")

    monkeypatch.setattr(MarkupClassifier, "predict_proba", fails)
    with pytest.raises(ConfigError, match="no such encoder"):
        run(create_app(classifier), lambda: asyncio.sleep(0))
