"""The engine's blocking work in threads, seen from asyncio: newest results, departed clients, the end of the server.

One thread per request, which ends with it. A result replaces the one before it, for each is a snapshot of the whole: a
client that reads slowly gets fewer and longer pieces, and nothing piles up. Knows threads and the ASGI `receive`. It
does not know requests, models or shapes of answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from onecard.inference.queue import QueueFull
from onecard.serve.http_error import ApiError

SPARE_THREADS = 16  # beyond the queue: for those that are about to be refused, or to end
RETRY_AFTER_SECONDS = 5

Result = TypeVar("Result")
Work = Callable[[threading.Event], Iterable[Result]]


class RequestThread(Generic[Result]):
    """Work in a thread of its own; `cancel` asks it to end."""

    def __init__(self, work: Work[Result], when_ended: Callable[[Any], None]) -> None:
        self.cancel = threading.Event()
        self.client_left = False
        self._work, self._when_ended = work, when_ended
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._newest: list[Result] = []  # one or none
        self._failure: BaseException | None = None
        self._is_done = False
        threading.Thread(target=self._run, name="onecard-api", daemon=True).start()

    async def next(self, timeout_seconds: float | None = None) -> Result | None:
        """The newest result not seen yet; None when time is over.

        Raises StopAsyncIteration after the last one, and what the work raised.
        """
        if not self._newest and not self._is_done:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout_seconds)
        self._news.clear()
        if self._newest:
            return self._newest.pop()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._is_done:
            raise StopAsyncIteration
        return None

    async def last(self) -> Result:
        """The last result. Raises what the work raised."""
        result: Result | None = None
        try:
            while True:
                newer = await self.next()
                result = newer if newer is not None else result
        except StopAsyncIteration:
            assert result is not None, "the work gave no result"
            return result

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            for result in self._work(self.cancel):
                self._tell(self._take, result)
        except BaseException as reason:
            failure = reason
        self._tell(self._finish, failure)

    def _tell(self, callback: Callable[[Any], None], value: Any) -> None:
        # Without a loop the server has ended, and nobody is left to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, value)

    def _take(self, result: Result) -> None:
        self._newest = [result]
        self._news.set()

    def _finish(self, failure: BaseException | None) -> None:
        self._failure, self._is_done = failure, True
        self._news.set()
        self._when_ended(self)


class RequestThreads:
    """All jobs of a server: how many there may be, and how they end with it."""

    def __init__(self, max_queue: int, n_parallel: int = 1) -> None:
        self._most = max_queue + n_parallel + SPARE_THREADS
        self._running: set[RequestThread[Any]] = set()
        self.is_stopping = False

    def __len__(self) -> int:
        return len(self._running)

    @asynccontextmanager
    async def run(self, work: Work[Result], receive: Receive) -> AsyncIterator[RequestThread[Result]]:
        """A job that is cancelled when the client leaves, when this block ends, or with the server.

        Raises QueueFull, and ApiError while the server is stopping.
        """
        if self.is_stopping:
            raise stopping()
        if len(self._running) >= self._most:
            raise QueueFull(len(self._running), RETRY_AFTER_SECONDS)
        # It counts until its thread has ended, which may be a little after this block.
        job = RequestThread(work, self._running.discard)
        self._running.add(job)
        watch = asyncio.create_task(cancel_when_left(job, receive))
        try:
            yield job
        finally:
            job.cancel.set()
            watch.cancel()

    def cancel_all(self) -> None:
        """End all jobs and take no more."""
        self.is_stopping = True
        for job in list(self._running):
            job.cancel.set()


async def cancel_when_left(job: RequestThread[Any], receive: Receive) -> None:
    """Wait until the client's connection is gone, then cancel its job."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.client_left = True
    job.cancel.set()


def stopping() -> ApiError:
    """What clients are told while the server goes down."""
    return ApiError(503, "the server is stopping", code="server_stopping")
