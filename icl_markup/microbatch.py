"""Micro-batching: concurrent requests wait in one bounded queue, and one thread, which owns the model, answers them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from icl_markup.errors import ConfigError, PromptError
from icl_markup.predict import Answer, Ask

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
ENDING = "the server is shutting down"


class BusyError(RuntimeError):
    """A request cannot wait: the queue is full, or the server is shutting down; the message says which."""


class _Waiting:
    """A request in the queue: texts to be answered, or a function to be called."""

    def __init__(self, texts: Sequence[str], function: Callable[[], Any] | None):
        self.texts = list(texts)
        self.function = function
        self.size = len(self.texts) or 1
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class MicroBatcher:
    """Answers texts of concurrent requests together, and calls functions between two batches, never beside one.

    Requests are taken in the order in which they came. Its methods belong to one event loop.

    Args:
        ask: answers texts; called in the worker thread, with checked texts.
        most_batch: the most texts a batch; a request with more of them is a batch by itself.
        wait_ms: milliseconds that the first text of a batch waits for others, unless the batch is full before.
        most_waiting: the most texts in the queue, a function counting as one.
        on_batch: told the number of texts of every batch, in the event loop.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        most_batch: int = 64,
        wait_ms: float = 3.0,
        most_waiting: int = 1024,
        on_batch: Callable[[int], None] | None = None,
    ):
        if most_batch < 1 or most_waiting < 1:
            raise ConfigError(f"texts a batch ({most_batch}) and in the queue ({most_waiting}): give at least 1")
        if not 0 <= wait_ms <= 10_000:
            raise ConfigError(f"a batch waits {wait_ms} milliseconds: give 0 to 10,000")
        self.most_waiting = most_waiting
        self._ask = ask
        self._most_batch = most_batch
        self._wait = wait_ms / 1000
        self._on_batch = on_batch
        self._queue: deque[_Waiting] = deque()
        self._size = 0
        self._closing = False
        self._taken: list[_Waiting] = []
        self._is_working = False
        self._arrived = asyncio.Event()
        self._enough = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="icl-markup-model")

    @property
    def waiting(self) -> int:
        """How many texts wait; those of the batch that is being answered no longer do."""
        return self._size

    @property
    def full(self) -> bool:
        """Whether not even one text more may wait."""
        return self._size >= self.most_waiting

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._task is not None and not self._task.done() and not self._closing

    @property
    def working(self) -> bool:
        """Whether the thread is at work; after `close` only where it was given up."""
        return self._is_working

    async def start(self) -> None:
        """Start to take requests."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread; after `give_up` wait for nothing."""
        self._closing = True
        self._arrived.set()
        self._enough.set()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()
        self._worker.shutdown(wait=not self._is_working)

    def give_up(self) -> int:
        """Take no more requests, and refuse those that wait or are being answered; return how many these are.

        The thread cannot be stopped: it goes on with what it is at (`working`), and nobody gets what it finds.
        """
        self._closing = True
        left = [request for request in (*self._taken, *self._queue) if not request.future.done()]
        for request in left:
            request.future.set_exception(BusyError(ENDING))
        self._queue.clear()
        self._size = 0
        if self._task is not None:
            self._task.cancel()
        return len(left)

    async def answers(self, texts: Sequence[str]) -> list[Answer]:
        """Return one answer a text, in order.

        Args:
            texts: one text or more, each of which passes `checked_texts`.

        Raises:
            PromptError: there are more texts than may wait.
            BusyError: the queue is full, or closed.
            Exception: what the model raised at the first text that it could not answer; other requests are answered.
        """
        found: list[Answer] = await self._submit(_Waiting(texts, None))
        return found

    async def call(self, function: Callable[[], _T]) -> _T:
        """Call a function in the worker thread, beside no batch and no other function, and return what it returns.

        Raises:
            BusyError: the queue is full, or closed.
            Exception: what the function raised.
        """
        found: _T = await self._submit(_Waiting((), function))
        return found

    async def _submit(self, request: _Waiting) -> Any:
        if not self.running:
            raise BusyError(ENDING)
        if request.size > self.most_waiting:
            raise PromptError(
                f"{request.size} texts in a request, where at most {self.most_waiting} may wait (--most-waiting); "
                "send fewer at once"
            )
        if self._size + request.size > self.most_waiting:
            raise BusyError(f"{self._size} texts are waiting, of at most {self.most_waiting}; try again later")
        self._queue.append(request)
        self._size += request.size
        self._arrived.set()
        if request.function is not None or self._size >= self._most_batch:
            self._enough.set()
        return await request.future

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                self._enough.clear()
                await self._arrived.wait()
            if self._size < self._most_batch and not self._enough.is_set():
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), self._wait)
            if not self._closing:
                self._enough.clear()
            if taken := self._take():
                await self._answer(taken)

    def _take(self) -> list[_Waiting]:
        """Take a function, or requests up to the next function or to a full batch; none that were given up."""
        taken: list[_Waiting] = []
        size = 0
        while self._queue:
            first = self._queue[0]
            if taken and (first.function or taken[0].function or size + first.size > self._most_batch):
                break
            self._queue.popleft()
            self._size -= first.size
            if not first.future.done():
                taken.append(first)
                size += first.size
        return taken

    async def _answer(self, taken: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        if taken[0].function is None and self._on_batch is not None:
            self._on_batch(sum(request.size for request in taken))
        self._taken, self._is_working = taken, True
        try:
            found = await loop.run_in_executor(self._worker, self._work, taken)
        except Exception as error:
            found = [error] * len(taken)
            self._is_working = False
        self._taken = []
        for request, result in zip(taken, found, strict=True):
            if request.future.done():
                continue
            if isinstance(result, Exception):
                # A future refuses StopIteration, and whoever waits for it would wait for ever.
                is_stop = isinstance(result, StopIteration)
                request.future.set_exception(RuntimeError(repr(result)) if is_stop else result)
            else:
                request.future.set_result(result)

    def _work(self, taken: list[_Waiting]) -> list[Any]:
        """Return each request's result or error; runs in the worker thread."""
        try:
            return self._results(taken)
        finally:
            self._is_working = False

    def _results(self, taken: list[_Waiting]) -> list[Any]:
        function = taken[0].function
        if function is not None:
            try:
                return [function()]
            except Exception as error:
                return [error]
        found = iter(self._each([text for request in taken for text in request.texts]))
        results: list[Any] = []
        for request in taken:
            own = list(islice(found, len(request.texts)))
            errors = [one for one in own if isinstance(one, Exception)]
            results.append(errors[0] if errors else own)
        return results

    def _each(self, texts: list[str]) -> list[Answer | Exception]:
        try:
            answers = self._ask(texts)
            if len(answers) != len(texts):
                raise RuntimeError(f"{len(answers)} answers to {len(texts)} texts")
            return list(answers)
        except Exception as error:
            if len(texts) == 1:
                return [error]
            # One text must not fail its neighbours: each is asked by itself.
            _LOG.warning("a batch of %d texts failed and is asked text by text: %s", len(texts), error)
            return [self._each([text])[0] for text in texts]
