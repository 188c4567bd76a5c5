"""One stream of news for all pages: server-sent events, and who is asked once a second whether there are some.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute, Route

from onecard.console import warn
from onecard.studio.http import finite

News = tuple[str, Any]  # the event's name, and what is sent as JSON
POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
MOST_WAITING = 1000  # events of a page that reads nothing; it is then sent away, comes again and loads all anew


@dataclass(eq=False)
class Subscriber:
    """One open page."""

    queue: asyncio.Queue[str | None] = field(default_factory=lambda: asyncio.Queue(MOST_WAITING))
    is_lost: bool = False


@dataclass(eq=False)
class EventHub:
    """Who listens, and `watchers`: functions that are called every second in a thread and return news. `closers` are
    called when the studio ends."""

    watchers: list[Callable[[], Iterable[News]]] = field(default_factory=list)
    closers: list[Callable[[], None]] = field(default_factory=list)
    _pages: set[Subscriber] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop | None = None
    _is_closed: bool = False
    _warned: str = ""

    @property
    def n_pages(self) -> int:
        return len(self._pages)

    def publish(self, name: str, content: Any) -> None:
        """Send an event to all open pages; from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            text = f"event: {name}\ndata: {json.dumps(finite(content), ensure_ascii=False)}\n\n"
            with suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self._send, text)

    def close(self) -> None:
        """End all streams, and call the closers; from any thread. Pages that are still open ask again until there is a
        studio."""
        self._is_closed = True
        for closer in self.closers:
            closer()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send, None)

    async def poll(self) -> None:
        """Ask the watchers until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            for watcher in self.watchers:
                for name, content in await run_in_threadpool(self._asked, watcher):
                    self.publish(name, content)
            await asyncio.sleep(POLL_SECONDS)

    async def stream(self) -> AsyncIterator[str]:
        """What one page is sent until it leaves or the studio ends."""
        self._loop = asyncio.get_running_loop()
        page = Subscriber()
        self._pages.add(page)
        try:
            yield "retry: 2000\nevent: hello\ndata: {}\n\n"
            while not page.is_lost and not self._is_closed:
                try:
                    text = await asyncio.wait_for(page.queue.get(), HEARTBEAT_SECONDS)
                except asyncio.TimeoutError:
                    text = ": still here\n\n"
                if text is None:
                    return
                yield text
        finally:
            self._pages.discard(page)

    def _asked(self, watcher: Callable[[], Iterable[News]]) -> list[News]:
        found: list[News] = []
        try:
            for news in watcher():
                found.append(news)
        except Exception as reason:  # one broken run must not keep the news of all others
            message = f"the studio could not look for news: {type(reason).__name__}: {reason}"
            if message != self._warned:  # not once a second
                warn(message)
            self._warned = message
        return found

    def _send(self, text: str | None) -> None:
        for page in list(self._pages):
            try:
                page.queue.put_nowait(text)
            except asyncio.QueueFull:
                page.is_lost = True


def routes(hub: EventHub) -> list[BaseRoute]:
    """GET /api/events."""

    async def events(request: Request) -> StreamingResponse:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(hub.stream(), media_type="text/event-stream", headers=headers)

    return [Route("/api/events", events)]
