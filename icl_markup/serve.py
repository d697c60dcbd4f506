"""The command `icl-markup serve`: a classifier's folder behind HTTP, on the loopback interface by default."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from contextlib import suppress

from icl_markup.classifier import MarkupClassifier
from icl_markup.errors import ConfigError
from icl_markup.quantisation import add_argument as add_quantisation

KEY_VARIABLE = "ICL_MARKUP_API_KEY"
"""The environment variable that holds the API key, unless another is named. A command line shows in process lists."""

GRACE_SECONDS = 120
"""After SIGTERM, requests in flight have so long to end."""

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
    parser.add_argument("--batch-tokens", type=int, help="most tokens of one forward pass")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    add_quantisation(parser)


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first.

    Raises:
        ConfigError: the extra is not installed, or the key, the port or a limit cannot be used.
        MarkupError: the classifier cannot be loaded.
    """
    try:
        import uvicorn

        from icl_markup.server import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f'serve needs more packages: pip install "icl-markup[serve]" ({error})') from error

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: give a number from 0 to 65535")
    key = api_key(args.api_key_env)
    is_local = is_loopback(args.host)
    if not is_local and key is None:
        print(
            f"icl-markup: anyone who can reach {args.host} can use and change this classifier; set {KEY_VARIABLE}",
            file=sys.stderr,
        )
    classifier = MarkupClassifier.load(
        args.classifier, device=args.device, batch_tokens=args.batch_tokens, quantisation=args.quantisation
    )
    app = create_app(
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
    _raise_open_files()
    # The server raises the signal that ended it once more when all is done. That a signal ended it is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        backlog=4096,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    uvicorn.Server(config).run()


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
