"""Health, metrics, the page's files, the API's description, and errors of the server."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.server import create_app
from tests.conftest import tiny_backbone
from tests.serve.asking import NEW, X, Y, detail


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
        'icl_markup_prefixes_total{found="hit"} 0.0',
        "icl_markup_prefix_bytes 0.0",
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


def test_metrics_tell_what_shared_prefixes_saved() -> None:
    model = MarkupModel(tiny_backbone("llama"))
    with TestClient(create_app(MarkupClassifier(model).fit(X, Y))) as client:
        for _ in range(2):
            assert client.post("/classify", json={"texts": NEW[:2]}).status_code == 200
        lines = client.get("/metrics").text.splitlines()
    counts = model.prefixes.counts
    assert counts.hits and counts.misses and counts.computed and counts.reused and model.prefixes.bytes
    for name, value in (
        ('prefixes_total{found="hit"}', counts.hits),
        ('prefixes_total{found="miss"}', counts.misses),
        ('prefix_tokens_total{how="computed"}', counts.computed),
        ('prefix_tokens_total{how="reused"}', counts.reused),
        ("prefix_bytes", model.prefixes.bytes),
    ):
        [line] = [one for one in lines if one.startswith(f"icl_markup_{name} ")]
        assert float(line.split()[-1]) == value
