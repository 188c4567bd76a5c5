"""Which paths of gradio's application are open, and how a closed page is noticed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from onecard.serve.web.browsers import POLICY, SessionGuard, SessionRegistry


def call(path: str, kind: str = "http", query: bytes = b"", app: Any = None) -> tuple[list[Any], list[str]]:
    """What came out for this path, and which pages were said to have left."""
    sent, left = [], []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if app:
            await app()

    async def send(message: Any) -> None:
        sent.append(message)

    guard = SessionGuard(inner, SessionRegistry(left.append))
    scope = {"type": kind, "path": path, "root_path": "", "method": "GET", "headers": [], "query_string": query}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return sent, left


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200), ("/assets/index.js", 200), ("/gradio_api/queue/join", 200), ("/gradio_api/cancel", 200),
        ("/login", 200), ("/gradio_api/upload", 403), ("/gradio_api/file=/etc/passwd", 403),
        ("/gradio_api/run/submit", 403), ("/gradio_api/call/x", 403), ("/gradio_api/heartbeat/x", 403),
        ("/gradio_api/vibe-edit", 403), ("/monitoring/summary", 403), ("/assets/../../etc/passwd", 403),
        ("/gradio_api/queue/data/../../file=x", 403), ("/login\n", 403), ("", 200),
    ],
)  # fmt: skip
def test_only_what_the_pages_need_is_open(path: str, status: int) -> None:
    sent, _ = call(path)
    assert sent[0]["status"] == status
    if status == 200:
        assert (b"content-security-policy", POLICY.encode()) in sent[0]["headers"]


def test_a_websocket_is_refused() -> None:
    sent, _ = call("/", kind="websocket")
    assert sent[0]["type"] == "websocket.close"


def test_the_end_of_its_connection_is_the_end_of_the_page() -> None:
    async def broken() -> None:
        raise asyncio.CancelledError

    assert call("/gradio_api/queue/data", query=b"session_hash=abc")[1] == ["abc"]
    assert call("/gradio_api/queue/join", query=b"session_hash=abc")[1] == []
    left: list[str] = []
    presence = SessionRegistry(left.append)

    async def visit() -> None:
        staying = asyncio.create_task(presence.stay("abc"))
        await asyncio.sleep(0)
        assert not staying.done()
        presence.gone("abc")
        await asyncio.wait_for(staying, 1)

    asyncio.run(visit())
    assert left == ["abc"]
    with pytest.raises(asyncio.CancelledError):
        call("/gradio_api/queue/data", query=b"session_hash=abc", app=broken)
