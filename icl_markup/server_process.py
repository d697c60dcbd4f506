"""The server as a process: the sockets it listens at, the signals that end it, and how long it then waits."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from icl_markup.errors import ConfigError
from icl_markup.microbatch import MicroBatcher

BACKLOG = 4096
"""Connections that the system holds until they are accepted; it may allow fewer (net.core.somaxconn)."""

_AFTER = 5
"""Seconds from the refusal of what waits to the end of connections that do not read or send."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """Serves an application until a signal; requests in flight have `grace` seconds, then they are refused with 503.

    A second signal refuses them at once. The application's lifespan surrounds all of it, so that what it raises is
    raised by `run`.

    Args:
        app: what `create_app` returned.
        grace: seconds.

    Attributes:
        left: how many requests were refused at the end.
    """

    def __init__(self, app: FastAPI, grace: float):
        # A limit of connections (limit_concurrency) would refuse /healthz too; the guard refuses what costs.
        config = uvicorn.Config(
            app, log_level="info", access_log=False, backlog=BACKLOG, server_header=False, lifespan="off",
            timeout_graceful_shutdown=math.ceil(grace) + _AFTER,
        )  # fmt: skip
        super().__init__(config)
        self.left = 0
        self._app = app
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def batcher(self) -> MicroBatcher:
        """The application's queue."""
        batcher: MicroBatcher = self._app.state.batcher
        return batcher

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Warm up, serve, and end."""
        self._loop = asyncio.get_running_loop()
        # While the first text is asked, nothing is in flight: a signal ends the process as it would any other.
        was = [(number, signal.signal(number, signal.SIG_DFL)) for number in _SIGNALS]
        try:
            async with self._app.router.lifespan_context(self._app):
                # The signal that ended it is raised once more when all is done. That is no failure.
                for number in _SIGNALS:
                    signal.signal(number, lambda *_: None)
                await super().serve(sockets)
        finally:
            for number, handler in was:
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for one in sockets or ():
            host, port = one.getsockname()[:2]
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            logging.getLogger("uvicorn.error").info("icl-markup is running on http://%s (Ctrl-C ends it)", place)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end when all are answered or the time is up."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; the second one ends the wait."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._give_up)
        else:
            super().handle_exit(sig, frame)

    def _give_up(self) -> None:
        self.left += self.batcher.give_up()


def bound(host: str, port: int) -> list[socket.socket]:
    """Return sockets that are bound to every address of a host and do not listen yet.

    Args:
        host: a name or address.
        port: the port; 0: a free one, the same at every address.

    Raises:
        ConfigError: the name is not known, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: no address of this machine ({error})") from error
    made: list[socket.socket] = []
    refused: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        # Of a name with several addresses (localhost) a machine may lack one, say that of IPv6.
        try:
            one = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            refused = error
            continue
        try:
            if os.name == "posix":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], made[0].getsockname()[1] if made else port, *address[2:]))
        except OSError as error:
            one.close()
            refused = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
            continue
        one.setblocking(False)
        made.append(one)
    if refused is not None and (not made or refused.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for one in made:
            one.close()
        raise unusable(host, port, refused) from refused
    return made


def unusable(host: str, port: int, error: OSError) -> ConfigError:
    """Return the error of a place that cannot be listened at, with the remedy."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} of {host} is in use by another program; end that one, or choose another with --port "
            "(0: a free one)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"port {port} of {host} is not allowed to this user; choose one above 1023 with --port")
    return ConfigError(f"--host {host} --port {port}: cannot be listened at ({error.strerror or error})")
