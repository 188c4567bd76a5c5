"""A socket, uvicorn, and an end without loose threads: how pages and API come to listen.

Knows addresses, signals and uvicorn. It does not know what is served.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn

from onecard.console import say
from onecard.errors import ConfigError
from onecard.serve.connections import ConnectionLimits, LimitedConnection

BACKLOG = 2048  # connections that the kernel holds until they are taken
# asyncio takes so many at once before it looks at the first: few, so that the limit acts before descriptors run out.
ACCEPTED_AT_ONCE = 16
# Answers end within a second of being told; what still stands open after this is a page that listens for news.
SHUTDOWN_SECONDS = 3


class Server(uvicorn.Server):
    """uvicorn that ends idle connections, and tells the application first when it stops, so that answers end."""

    def __init__(self, app: Any, before_shutdown: Callable[[], None], limits: ConnectionLimits | None = None) -> None:
        self._limits = limits or ConnectionLimits()
        config = uvicorn.Config(
            app,
            http=partial(LimitedConnection, limits=self._limits),  # type: ignore[arg-type]  # it is only called
            loop="asyncio",
            backlog=ACCEPTED_AT_ONCE,
            ws="none",
            log_config=None,
            log_level="critical",  # requests are printed by RequestLog, which keeps prompts out
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self._before_shutdown = before_shutdown

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._limits.handle_loop_error)
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)  # asyncio has set the kernel's queue to ACCEPTED_AT_ONCE as well

    async def on_tick(self, counter: int) -> bool:
        for connection in list(self.server_state.connections):
            if isinstance(connection, LimitedConnection):
                connection.check()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_shutdown()
        await super().shutdown(sockets)


def run_server(
    app: Any, host: str, port: int, *, before_shutdown: Callable[[], None] | None = None,
    when_open: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM; running answers are then cancelled, and their clients told.

    Port 0 takes a free one. `before_shutdown` is called first when it ends; by default the app's own `stop_answers`.
    `when_open` is told the address as soon as connections to it wait and are not refused.
    Raises ConfigError for an address that is unknown or a port that is taken.
    """
    with open_socket(host, port) as listening:
        stop_answers: Any = getattr(app, "stop_answers", lambda: None)
        server = Server(app, before_shutdown or stop_answers)
        say(f"listening on {url_of(listening, host)}  (Ctrl-C stops)")
        if when_open is not None:
            when_open(url_of(listening, host))
        with suppress(KeyboardInterrupt), sigterm_as_interrupt():
            server.run(sockets=[listening])
    say("stopped")


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to this address. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as reason:
        raise ConfigError("--host", f"{host!r} is no address of this machine ({reason.strerror or reason})") from None
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listening = socket.socket(family, kind, protocol)
    if os.name == "posix":  # elsewhere the option lets two programs take one port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as reason:
        listening.close()
        advice = "another program listens there, or it needs more rights; choose another one, or 0 for any free one"
        raise ConfigError("--port", f"{port} on {host}: {reason.strerror or reason}: {advice}") from None
    return listening


def url_of(listening: socket.socket, host: str) -> str:
    """The address to type into a browser: port 0 and the address of all networks are none."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listening.getsockname()[1]}"


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM ends the program as Ctrl-C does: by an exception, so that everything is put away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
