"""What every request passes before it reaches a route: the host it names, the API key, and the size of its body.

It wraps an ASGI application (https://asgi.readthedocs.io), and depends on no framework.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

QUEUE_PATHS = frozenset({"/classify", "/prompt"})
"""Paths whose requests wait for the model; while the queue is full they are refused before anything of them is read."""

OPEN_PATHS = frozenset({"/", "/docs", "/healthz", "/openapi.json"})
"""Paths that need no key: they tell nothing about labels or examples."""

STATIC = "/static/"
_PATHS = (OPEN_PATHS | {"/classify", "/intents", "/metrics", "/prompt"}) - {STATIC}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_RETRY = [(b"retry-after", b"1")]


class _RefusedError(Exception):
    """A request goes no further."""

    def __init__(self, status: int, detail: str, headers: Collection[tuple[bytes, bytes]] = ()):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = list(headers)


class Guard:
    """Refuses requests with 400, 401, 408, 413, 421 or 503, each with a reason as JSON, and counts all of them.

    A body is read whole before the application is called, so that no half of one reaches it.

    Args:
        app: the application.
        api_key: the key that `X-API-Key` or `Authorization: Bearer` must hold; None: none is needed.
        hosts: the names that the header `Host` may hold, without port; empty: any. A page of another site that made
            its name point here would otherwise read the answers (DNS rebinding).
        most_bytes: the most bytes of a body.
        most_held: the most bytes of bodies of all requests together, those that wait for their answer included.
        body_seconds: seconds within which a body must have arrived.
        most_inside: the most requests for the queue's paths that are on their way to an answer. Requests that arrive
            together would otherwise all be read and checked before the first of them stands in the queue.
        is_full: says whether the queue is full.
        is_ending: says whether the server is shutting down; a request that the server then cancels is told so.
        on_request: told path, status and seconds of every request; the path is a route's, or ``other``.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        hosts: Collection[str],
        most_bytes: int,
        most_held: int,
        body_seconds: float,
        most_inside: int,
        is_full: Callable[[], bool],
        is_ending: Callable[[], bool],
        on_request: Callable[[str, int, float], None],
    ):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(host.lower() for host in hosts)
        self._most_bytes = most_bytes
        self._most_held = most_held
        self._body_seconds = body_seconds
        self._most_inside = most_inside
        self._is_full = is_full
        self._is_ending = is_ending
        self._on_request = on_request
        self._held = 0
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets
            await send({"type": "websocket.close", "code": 1000})
            return
        began = time.perf_counter()
        status = 0
        inside = 0
        body = bytearray()

        async def sending(message: Message) -> None:
            nonlocal status, inside
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
                # Who reads an answer slowly keeps nobody out.
                self._inside -= inside
                inside = 0
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check(scope["path"], headers)
            if scope["path"] in QUEUE_PATHS:
                self._admit()
                inside = 1
            await self._read(body, receive, headers)
            await self._app(scope, _replayed(bytes(body), receive), sending)
        except _RefusedError as refusal:
            await _refuse(refusal, sending)
        except asyncio.CancelledError:
            # Only the server's end is answered: whoever else cancels waits for the cancellation.
            if not self._is_ending():
                raise
            if not status:
                await _refuse(_RefusedError(503, "the server is shutting down", _RETRY), sending)
        finally:
            self._held -= len(body)
            self._inside -= inside
            self._on_request(route_of(scope["path"]), status or 500, time.perf_counter() - began)

    def _admit(self) -> None:
        if self._inside >= self._most_inside or self._is_full():
            raise _RefusedError(503, "as many texts are waiting as may wait; try again later", _RETRY)
        self._inside += 1

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts and host not in self._hosts:
            raise _RefusedError(421, f"host {host[:80]!r} is not served here; this server listens to this machine only")
        if self._key is None or path in OPEN_PATHS or path.startswith(STATIC):
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = headers.get(b"x-api-key", bearer.strip() if scheme.lower() == b"bearer" else b"")
        if not hmac.compare_digest(given, self._key):
            detail = "the API key is wrong" if given else "an API key is needed, as X-API-Key or Authorization: Bearer"
            raise _RefusedError(401, detail, [(b"www-authenticate", b"Bearer")])

    async def _read(self, body: bytearray, receive: Receive, headers: dict[bytes, bytes]) -> None:
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit():
            raise _RefusedError(400, "Content-Length is no number")
        # A number of more digits than any body could have is not read: Python refuses to, beyond 4,300.
        if len(announced) > 18 or int(announced) > self._most_bytes:
            raise self._too_large()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _RefusedError(400, "the connection closed before the body was whole")
                part = message.get("body", b"")
                body.extend(part)
                self._held += len(part)
                if len(body) > self._most_bytes:
                    raise self._too_large()
                if self._held > self._most_held:
                    raise _RefusedError(503, "too many large requests are waiting; try again", _RETRY)
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self._body_seconds)
        except asyncio.TimeoutError:
            raise _RefusedError(408, f"the body did not arrive within {self._body_seconds:g} seconds") from None

    def _too_large(self) -> _RefusedError:
        return _RefusedError(413, f"the body is larger than {self._most_bytes:,} bytes; send fewer or shorter texts")


def route_of(path: str) -> str:
    """Return the route of a path, one of few: what stands in metrics must not grow with what is asked for."""
    if path in _PATHS:
        return path
    if path.startswith("/intents/"):
        return "/intents/{label}"
    return STATIC if path.startswith(STATIC) else "other"


def _host(value: str) -> str:
    """Return a Host header's name without its port; an IPv6 address without its brackets."""
    if value.startswith("["):
        return value[1:].partition("]")[0].lower()
    return value.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that yields a body which was read already, then what else is received."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(refusal: _RefusedError, send: Send) -> None:
    body = json.dumps({"detail": refusal.detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
