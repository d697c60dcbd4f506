"""The command `icl-markup serve`: a classifier's folder behind HTTP, on the loopback interface by default."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from icl_markup.classifier import MarkupClassifier
from icl_markup.errors import ConfigError
from icl_markup.quantisation import add_argument as add_quantisation

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY_VARIABLE = "ICL_MARKUP_API_KEY"
"""The environment variable that holds the API key, unless another is named. A command line shows in process lists."""

GRACE_SECONDS = 120.0
"""After SIGTERM, requests in flight have so long to end."""

_SWITCH_SECONDS = 0.0005
"""How long one thread may hold the interpreter. Every read and write of a socket lets go of it, and with Python's 5 ms
has to wait that long for the thread of the model: thousands of connections then take minutes."""

_EXTRA = frozenset({"fastapi", "starlette", "uvicorn", "prometheus_client"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--classifier", required=True, help="a classifier's folder, made by fit")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen to (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    parser.add_argument("--api-key-env", metavar="NAME",
                        help=f"an environment variable that holds the API key (default: {KEY_VARIABLE})")  # fmt: skip
    parser.add_argument("--save", action="store_true", help="write the folder after each change of the intents")
    parser.add_argument("--most-bytes", type=int, default=2**20, help="the most bytes of a request's body")
    parser.add_argument("--most-batch", type=int, default=64, help="the most texts that are answered together")
    parser.add_argument("--batch-wait-ms", type=float, default=3.0, help="milliseconds that a text waits for others")
    parser.add_argument("--most-waiting", type=int, default=1024, help="the most texts that wait; beyond: 503")
    parser.add_argument("--grace-seconds", type=float, default=GRACE_SECONDS,
                        help="seconds that requests in flight have after SIGTERM; then: 503")  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, help="most tokens of one forward pass")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    add_quantisation(parser)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first.

    Returns:
        The exit code: 0, or 1 if requests were refused at the end, as they took longer than `--grace-seconds`. If the
        model is still at work on one then, the process ends here: a thread cannot be stopped.

    Raises:
        ConfigError: the extra is not installed, or the key, the port or a limit cannot be used.
        MarkupError: the classifier cannot be loaded, or cannot answer.
    """
    try:
        from icl_markup.server import create_app
        from icl_markup.server_process import Server, bound, unusable
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f'serve needs more packages: pip install "icl-markup[serve]" ({error})') from error

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: give a number from 0 to 65535")
    if not 0 <= args.grace_seconds <= 86_400:
        raise ConfigError(f"--grace-seconds {args.grace_seconds:g}: give 0 to 86,400")
    key = api_key(args.api_key_env)
    is_local = is_loopback(args.host)
    if not is_local and key is None:
        print(
            f"icl-markup: anyone who can reach {args.host} can use and change this classifier; set {KEY_VARIABLE}",
            file=sys.stderr,
        )
    # Before the model is loaded, which takes a while; connections are refused until it is ready.
    sockets = bound(args.host, args.port)
    switch = sys.getswitchinterval()
    try:
        server = Server(_app(args, create_app, key, is_local), args.grace_seconds)
        _raise_open_files()
        sys.setswitchinterval(_SWITCH_SECONDS)
        server.run(sockets)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Two servers that begin at the same time can both be bound; only one of them can listen.
        raise unusable(args.host, args.port, error) from error
    finally:
        sys.setswitchinterval(switch)
        for one in sockets:
            one.close()
    if server.left:
        print(
            f"icl-markup: {server.left} requests took longer than {args.grace_seconds:g} seconds and were refused",
            file=sys.stderr,
        )
    code = 1 if server.left else 0
    if server.batcher.working:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _app(args: argparse.Namespace, create_app: Callable[..., FastAPI], key: str | None, is_local: bool) -> FastAPI:
    classifier = MarkupClassifier.load(
        args.classifier, device=args.device, batch_tokens=args.batch_tokens, quantisation=args.quantisation
    )
    return create_app(
        classifier,
        api_key=key,
        save=args.classifier if args.save else None,
        # With a key, another site's page that reaches this port is refused by that.
        hosts=("localhost", "127.0.0.1", "::1", args.host) if is_local and key is None else (),
        most_bytes=args.most_bytes,
        most_batch=args.most_batch,
        batch_wait_ms=args.batch_wait_ms,
        most_waiting=args.most_waiting,
    )


def api_key(variable: str | None) -> str | None:
    """Return the API key in an environment variable.

    Args:
        variable: its name; None: `KEY_VARIABLE`, which may be unset.

    Raises:
        ConfigError: a variable is named, and unset or empty.
    """
    key = os.environ.get(variable or KEY_VARIABLE) or None
    if variable is not None and key is None:
        raise ConfigError(f"--api-key-env {variable}: that environment variable is unset or empty")
    return key


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_open_files() -> None:
    """Allow as many open connections as the system lets a process ask for."""
    with suppress(ImportError, ValueError, OSError):  # not everywhere, and not always allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
