"""Many connections at once over real sockets: a full queue refuses them cheaply, and health is told all the while."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from tests.serve.process import StuckCommand

CONNECTIONS = 2_000
WAITING = 100


def request(body: bytes) -> bytes:
    head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def ask(port: int, texts: list[str], statuses: Counter[int]) -> None:
    """Ask over a connection that stays open until it is answered, and count the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(json.dumps({"texts": texts}).encode()))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status == 200 or b"retry-after: 1" in head, head
        statuses[status] += 1
    finally:
        writer.close()


def test_of_thousands_of_connections_none_is_left_without_an_answer(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 200:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 200), hard))
    statuses: Counter[int] = Counter()

    async def many() -> int:
        tasks = [asyncio.ensure_future(ask(command.port, ["stuck"], statuses)) for _ in range(CONNECTIONS)]
        while sum(statuses.values()) < CONNECTIONS - WAITING - 1:
            await asyncio.sleep(0.02)
            for task in tasks:
                if task.done():
                    task.result()
        async with httpx2.AsyncClient(base_url=command.url) as client:
            health = (await client.get("/healthz", timeout=30)).status_code
            deadline = time.monotonic() + 60
            while True:
                told = (await client.get("/metrics", timeout=30)).text
                waiting = next(
                    float(line.split()[1]) for line in told.splitlines() if line.startswith("icl_markup_queue_texts ")
                )
                # The last of those that wait may still be on their way.
                if sum(statuses.values()) + waiting + 1 == CONNECTIONS:
                    break
                assert time.monotonic() < deadline, (statuses, waiting)
                await asyncio.sleep(0.1)
        # One less waits where the queue was full before its first text was taken.
        assert waiting in (WAITING - 1, WAITING)
        assert statuses == {503: CONNECTIONS - waiting - 1}, "all others wait"
        await asyncio.to_thread(command.stop)
        await asyncio.gather(*tasks)
        return health

    try:
        options = (
            "--most-waiting",
            str(WAITING),
            "--most-batch",
            "1",
            "--batch-wait-ms",
            "0",
            "--grace-seconds",
            "0.2",
        )
        with StuckCommand(folder, *options) as command:
            assert asyncio.run(asyncio.wait_for(many(), 120)) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert statuses == {503: CONNECTIONS}
    assert "Traceback" not in "".join(command.log)
