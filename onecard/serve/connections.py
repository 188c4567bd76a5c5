"""How long a client may keep a connection waiting, and how many connections there are: uvicorn limits neither.

Knows uvicorn's connections. It does not know what is asked and answered on them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from onecard.console import warn

MAX_CONNECTIONS = 512
SECONDS_BETWEEN_WARNINGS = 60


def default_max_connections() -> int:
    """Half of the files that this process may have open: models and requests need some as well."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(8, min(MAX_CONNECTIONS, soft // 2))


@dataclass
class ConnectionLimits:
    """What a client must keep to; times in seconds. An answer may take as long as it likes."""

    head_seconds: float = 20  # from the connection, or the answer before, to the end of the request's headers
    body_seconds: float = 60
    unread_seconds: float = 300  # in which a client takes nothing of what was sent to it
    max_connections: int = field(default_factory=default_max_connections)
    clock: Callable[[], float] = time.monotonic

    _warned_at: float | None = None
    _n_unsaid: int = 0

    def warn_once_a_minute(self, message: str) -> None:
        """Warn of the first one; those that follow within a minute are counted in the next line."""
        now = self.clock()
        if self._warned_at is not None and now - self._warned_at < SECONDS_BETWEEN_WARNINGS:
            self._n_unsaid += 1
            return
        warn(message + (f" ({self._n_unsaid} more since the last such line)" if self._n_unsaid else ""))
        self._warned_at, self._n_unsaid = now, 0

    def handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For asyncio, which would write a traceback for every connection that it has no file descriptor for."""
        if "socket.accept" in context["message"]:
            self.warn_once_a_minute("too many open files: new connections have to wait until others end")
        else:
            loop.default_exception_handler(context)


class LimitedConnection(H11Protocol):
    """A connection that ends when its client keeps it waiting too long, or when others need its place."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **names: Any) -> None:
        super().__init__(*args, **names)
        self._limits = limits
        self._awaited: tuple[str, object] = ("head", None)
        self._n_resumed = 0
        self.waiting_since = limits.clock()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        most = self._limits.max_connections
        if len(self.connections) <= most:
            return
        others = [c for c in self.connections if isinstance(c, LimitedConnection) and c is not self]
        idle = [c for c in others if c.awaited()[0] in ("head", "body")]
        if idle:
            longest = min(idle, key=lambda c: (c.awaited()[0] == "body", c.waiting_since))
            longest.end(f"more than {most} are open, and it was idle longest")
        else:
            self.end(f"more than {most} are open, and all are in use")

    def resume_writing(self) -> None:
        self._n_resumed += 1
        super().resume_writing()

    def awaited(self) -> tuple[str, object]:
        """What the client has to do next, ("", None) while it waits for us, and what changes when it did."""
        is_answered = self.cycle is None or self.cycle.response_complete
        n_unread = self.transport.get_write_buffer_size()
        if n_unread and (is_answered or self.flow.write_paused):  # nothing is added now: only reading changes it
            # Both: between two looks all of it may have been read and as many bytes been added.
            return "reading", (n_unread, self._n_resumed)
        if is_answered:
            return "head", self.cycle
        # While reading is paused it is the application that has not taken the body yet.
        return ("body", self.cycle) if self.cycle.more_body and not self.flow.read_paused else ("", None)

    def check(self) -> None:
        """End the connection if its client is too slow. To be called again and again."""
        now, awaited = self._limits.clock(), self.awaited()
        if awaited != self._awaited:
            self._awaited, self.waiting_since = awaited, now
        limits = self._limits
        seconds = {"head": limits.head_seconds, "body": limits.body_seconds, "reading": limits.unread_seconds}
        allowed = seconds.get(awaited[0])
        if allowed is None or now - self.waiting_since < allowed:
            return
        # Browsers open connections in advance and send nothing: that is not worth a line.
        is_silent = awaited[0] == "head" and not self.conn.trailing_data[0]
        what = "took nothing of its answer" if awaited[0] == "reading" else f"sent no whole {awaited[0]} of a request"
        self.end("" if is_silent else f"the client {what} within {allowed:g} s")

    def end(self, why: str) -> None:
        """Close at once, whatever was not sent yet; `why` is told unless it is empty."""
        self.connections.discard(self)
        self.transport.abort()
        if why:
            self._limits.warn_once_a_minute(f"a connection was closed: {why}")
