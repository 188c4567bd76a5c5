"""What gradio's application may be asked for, and what its pages may load: nothing that these pages do not need.

gradio serves files, takes uploads, describes an API, proxies and more. The pages here need none of it (a chat is saved
and loaded by the browser itself), so those paths are closed to everybody. Knows paths and headers. It does not know
gradio as a library, hosts or keys (security.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

from onecard.serve.http_error import ApiError
from onecard.serve.security import AddedHeaders, refuse

# The page, its parts, its steps (joined, heard of, cancelled), and logging in.
_OPEN = re.compile(
    r"/|/config/?|/theme\.css|/assets/.+|/static/.+|/svelte/.+|/favicon\.ico|/manifest\.json|/robots\.txt|/login/?|/logout"
    r"|/gradio_api/(app_id|startup-events|login_check|queue/join|queue/data|cancel|reset)/?"
)

# Whatever a renderer would make of a model's words: no foreign host is asked for anything, no foreign page frames this.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio's start and its `js=` snippets are inline
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
_HEADERS = ((b"content-security-policy", POLICY.encode("ascii")), (b"x-dns-prefetch-control", b"off"))


class SessionRegistry:
    """Which pages are open. `leave` is called with the session of each that was closed.

    Each page has one step that lasts as long as the page is open (`stay`). For gradio ends the connection over which a
    page hears of its steps whenever none is left, and a step begun at that moment would never be heard of. So the
    connection ends only with the page, and tells of its end.
    """

    def __init__(self, leave: Callable[[str], object]) -> None:
        self._leave = leave
        self._open: dict[str, asyncio.Event] = {}

    async def stay(self, browser: str) -> None:
        """Wait until this page is closed."""
        await self._open.setdefault(browser, asyncio.Event()).wait()

    def gone(self, browser: str) -> None:
        """This page's connection has ended."""
        closed = self._open.pop(browser, None)
        if closed is not None:
            closed.set()
        self._leave(browser)


class SessionGuard:
    """Lets only the paths of the pages through, gives every answer the policy, and notices when a page is closed."""

    def __init__(self, app: ASGIApp, presence: SessionRegistry) -> None:
        self._app, self._presence = AddedHeaders(app, _HEADERS, replaces=True), presence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if scope["type"] != "http" or not _OPEN.fullmatch(path) or ".." in path:
            return await refuse(scope, send, ApiError(403, "the page does not offer this", code="not_offered"))

        try:
            await self._app(scope, receive, send)
        finally:
            if path == "/gradio_api/queue/data":
                query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
                for browser in query.get("session_hash", []):
                    self._presence.gone(browser)
        return None
