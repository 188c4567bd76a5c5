"""A real server for any application, without a model: a socket of its own, uvicorn in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onecard.serve.connections import ConnectionLimits
from onecard.serve.listen import Server, open_socket


async def inside(scope: Any, receive: Any, send: Any) -> None:
    """The application behind the layers: tells how many bytes it was sent."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    n_bytes, more = 0, True
    while more:
        message = await receive()
        n_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(n_bytes).encode()})


class QuickServer(Server):
    """Looks at its connections, and whether it shall end, a hundred times a second instead of ten."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@contextmanager
def listening(app: Any, limits: ConnectionLimits | None = None) -> Iterator[tuple[str, int]]:
    """A real server with this application; gives its address."""
    with open_socket("127.0.0.1", 0) as taken:
        server = QuickServer(app, lambda: None, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield taken.getsockname()
        server.should_exit = True
        thread.join(10)
