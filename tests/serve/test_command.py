"""`icl-markup serve` as a process: how it begins, ends, and what it refuses."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from icl_markup import MarkupClassifier
from icl_markup.cli import main
from icl_markup.serve import api_key, is_loopback
from icl_markup.server_process import bound
from tests.serve.asking import KEY
from tests.serve.process import Command, StuckCommand


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
        (["--most-bytes", "0", "--port", "0"], "positive"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        (["--most-waiting", "0", "--port", "0"], "at least 1"),
    ):
        assert main([*serve, *options]) == 2
        assert told in capsys.readouterr().err
    assert main(["serve", "--classifier", str(folder / "nowhere"), "--port", "0"]) == 2
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


@pytest.mark.parametrize("signals", [1, 2], ids=["the grace period", "a second signal"])
def test_a_stuck_batch_does_not_outlive_the_grace_period(folder: Path, signals: int) -> None:
    grace = "0.5" if signals == 1 else "3600"
    command = StuckCommand(folder, "--grace-seconds", grace, "--most-batch", "1", "--batch-wait-ms", "0")
    found: list[httpx2.Response] = []

    def ask(text: str) -> None:
        found.append(httpx2.post(f"{command.url}/classify", json={"text": text}, timeout=60))

    asks = [threading.Thread(target=ask, args=(f"stuck {i}",)) for i in range(3)]
    try:
        for one in asks:
            one.start()
        for _ in range(1000):
            if "icl_markup_queue_texts 2.0" in httpx2.get(f"{command.url}/metrics").text:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("the requests never waited")
        if signals == 2:
            command.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert command.process.poll() is None
        assert command.stop() == 1, "".join(command.log)
        for one in asks:
            one.join(60)
    finally:
        command.process.kill()
        command.process.wait()
    assert [answer.status_code for answer in found] == [503] * 3
    assert all("shutting down" in answer.json()["detail"] for answer in found)
    log = "".join(command.log)
    assert "Traceback" not in log and "3 requests" in log, log


def test_a_port_in_use_is_an_error_that_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--classifier", str(folder), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"port {port}" in told and "--port" in told and "in use" in told and told.count("\n") == 1


def test_two_that_begin_together_do_not_both_listen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Bound first, with the option that lets another be bound as well, and listening before that one listens.
    [first] = bound("127.0.0.1", 0)
    port = first.getsockname()[1]

    def listens(*_: Any, **__: Any) -> Any:
        first.listen()
        return load(folder)

    load = MarkupClassifier.load
    with pytest.MonkeyPatch.context() as patch, first:
        patch.setattr(MarkupClassifier, "load", listens)
        assert main(["serve", "--classifier", str(folder), "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_a_name_is_bound_at_each_of_its_addresses() -> None:
    sockets = bound("localhost", 0)
    try:
        places = [one.getsockname() for one in sockets]
        assert {place[0] for place in places} <= {"127.0.0.1", "::1"} and len({place[1] for place in places}) == 1
    finally:
        for one in sockets:
            one.close()
