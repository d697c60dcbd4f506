"""The micro-batcher by itself, with a stand-in for the model: what it batches, refuses, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from icl_markup.errors import PromptError
from icl_markup.microbatch import BusyError, MicroBatcher


class Model:
    """Answers texts with themselves; holds until it is let go, and fails at texts that begin with ``bad``."""

    def __init__(self, held: bool = False):
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        if not held:
            self.open.set()

    def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
        self.batches.append(texts)
        assert self.open.wait(30)
        for text in texts:
            if text.startswith("bad"):
                raise PromptError(f"{text} does not fit")
        return [{"label": text} for text in texts]


def batched(model: Model, action: Callable[[MicroBatcher], Awaitable[Any]], **options: Any) -> Any:
    async def whole() -> Any:
        batcher = MicroBatcher(model, **options)
        await batcher.start()
        try:
            return await action(batcher)
        finally:
            model.open.set()
            await batcher.close()

    return asyncio.run(asyncio.wait_for(whole(), 60))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def test_a_failing_text_does_not_fail_its_neighbours() -> None:
    model = Model()

    async def mixed(batcher: MicroBatcher) -> Any:
        asks = [batcher.answers(texts) for texts in (["a", "b"], ["c", "bad 1", "bad 2"], ["d"])]
        return await asyncio.gather(*asks, return_exceptions=True)

    found = batched(model, mixed, wait_ms=50)
    assert found[0] == [{"label": "a"}, {"label": "b"}] and found[2] == [{"label": "d"}]
    assert isinstance(found[1], PromptError) and str(found[1]) == "bad 1 does not fit"
    assert model.batches[0] == ["a", "b", "c", "bad 1", "bad 2", "d"], "they were one batch"


def test_a_wrong_number_of_answers_is_an_error_and_no_wrong_answer() -> None:
    class Short(Model):
        def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
            return super().__call__(texts)[:-1]

    with pytest.raises(RuntimeError, match="0 answers to 1 texts"):
        batched(Short(), lambda batcher: batcher.answers(["a", "b"]))


@pytest.mark.parametrize("error", [StopIteration, MemoryError, KeyError])
def test_any_error_reaches_who_waits(error: type[Exception]) -> None:
    class Failing(Model):
        def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
            raise error

    for action in (lambda batcher: batcher.answers(["a"]), lambda batcher: batcher.call(lambda: next(iter(())))):
        with pytest.raises((error, RuntimeError)):
            batched(Failing(), action)


def test_a_full_queue_refuses_and_takes_again() -> None:
    model = Model(held=True)

    async def fill(batcher: MicroBatcher) -> Any:
        first = asyncio.ensure_future(batcher.answers(["first"]))
        await until(lambda: bool(model.batches))
        waiting = [asyncio.ensure_future(batcher.answers([str(i)])) for i in range(3)]
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(BusyError, match="3 texts are waiting, of at most 3"):
            await batcher.answers(["too many"])
        with pytest.raises(BusyError):
            await batcher.call(lambda: None)
        model.open.set()
        await asyncio.gather(first, *waiting)
        return await batcher.answers(["x", "y", "z"])

    assert batched(model, fill, most_waiting=3) == [{"label": text} for text in "xyz"]


def test_a_change_runs_between_batches_and_in_its_turn() -> None:
    model = Model(held=True)
    seen: list[int] = []

    async def change(batcher: MicroBatcher) -> Any:
        asks = [batcher.answers(["a"]), batcher.answers(["b"])]
        asks += [batcher.call(lambda: seen.append(len(model.batches))), batcher.answers(["c"])]  # type: ignore[list-item]
        tasks = [asyncio.ensure_future(one) for one in asks]
        await until(lambda: bool(model.batches))
        model.open.set()
        await asyncio.gather(*tasks)

    batched(model, change, wait_ms=50)
    assert model.batches == [["a", "b"], ["c"]] and seen == [1]
    with pytest.raises(ZeroDivisionError):
        batched(Model(), lambda batcher: batcher.call(lambda: 1 // 0))


def test_what_was_given_up_is_not_asked() -> None:
    model = Model(held=True)

    async def give_up(batcher: MicroBatcher) -> Any:
        first = asyncio.ensure_future(batcher.answers(["first"]))
        await until(lambda: bool(model.batches))
        second = asyncio.ensure_future(batcher.answers(["given up"]))
        third = asyncio.ensure_future(batcher.answers(["third"]))
        await until(lambda: batcher.waiting == 2)
        second.cancel()
        model.open.set()
        return await asyncio.gather(first, third)

    assert batched(model, give_up) == [[{"label": "first"}], [{"label": "third"}]]
    assert model.batches == [["first"], ["third"]]


def test_closing_answers_what_waits_and_refuses_the_rest() -> None:
    model = Model(held=True)

    async def closing() -> None:
        batcher = MicroBatcher(model, most_batch=1)
        await batcher.start()
        tasks = [asyncio.ensure_future(batcher.answers([str(i)])) for i in range(5)]
        await until(lambda: bool(model.batches))
        end = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="shutting down"):
            await batcher.answers(["late"])
        assert not end.done()
        model.open.set()
        assert await asyncio.gather(*tasks) == [[{"label": str(i)}] for i in range(5)]
        await end

    asyncio.run(asyncio.wait_for(closing(), 30))


def test_what_is_given_up_is_told_and_not_waited_for() -> None:
    model = Model(held=True)

    async def given_up() -> None:
        batcher = MicroBatcher(model, most_batch=1)
        await batcher.start()
        tasks = [asyncio.ensure_future(batcher.answers([str(i)])) for i in range(3)]
        await until(lambda: bool(model.batches))
        end = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0.05)
        assert not end.done()
        assert batcher.give_up() == 3 and batcher.give_up() == 0
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, BusyError) and "shutting down" in str(error)
        await asyncio.wait_for(end, 5)
        assert batcher.working and not batcher.running and batcher.waiting == 0
        with pytest.raises(BusyError, match="shutting down"):
            await batcher.answers(["late"])
        model.open.set()
        await until(lambda: not batcher.working)

    try:
        asyncio.run(asyncio.wait_for(given_up(), 30))
    finally:
        model.open.set()
    assert model.batches == [["0"]], "the others were not asked"


def test_a_request_larger_than_the_queue_is_the_senders_fault() -> None:
    with pytest.raises(PromptError, match="4 texts in a request, where at most 3 may wait"):
        batched(Model(), lambda batcher: batcher.answers(["a"] * 4), most_waiting=3)
