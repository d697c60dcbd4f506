"""What the server's tests share: texts, and ways to ask an application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.conftest import TEXTS

X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]
NEW = [text for texts in TEXTS.values() for text in texts[2:]]
KEY = "a-key-of-ASCII"


def detail(answer: httpx2.Response, status: int) -> str:
    """Check an error's status and form, and return its sentence."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"]
    return str(answer.json()["detail"])


def labels(client: TestClient) -> list[str]:
    return [row["label"] for row in client.get("/intents").json()["intents"]]


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
            return await asyncio.wait_for(action(), 120)

    return asyncio.run(whole())
