"""The size of a request's body: counted while it is read, packed and unpacked.

The length that a client announces may be missing or wrong, and a little gzip can unpack to gigabytes.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onecard.serve.http_error import ApiError, send_error

GZIP = ("gzip", "x-gzip")  # RFC 9110, 8.4.1.3
DRAIN_SECONDS = 30  # so long a body that is too large is still read: who is cut off while sending reads no answer


class BodyLimit:
    """Answers 413 to a body of more than `max_bytes`, announced or not, and unpacks gzip up to that size.

    Another Content-Encoding gets 415, with the ones that are known (RFC 9110, 15.5.16).
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(raw=scope["headers"])
        named = ",".join(headers.getlist("content-encoding")).lower().split(",")
        encodings = [name.strip() for name in named if name.strip() not in ("", "identity")]
        body = CountedBody(scope, receive, send, self._max_bytes, is_packed=bool(encodings))
        announced = headers.getlist("content-length")
        if any(length.isdigit() and int(length[:20]) > self._max_bytes for length in announced):
            return await body.refuse(body.too_large())
        if encodings and (len(encodings) > 1 or encodings[0] not in GZIP):
            message = f"bodies packed as {', '.join(encodings)[:100]!r} are not read here; send gzip, or unpacked JSON"
            error = ApiError(415, message, code="unsupported_content_encoding", headers={"accept-encoding": "gzip"})
            return await body.refuse(error)
        if encodings:
            outer = (b"content-encoding", b"content-length")
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] not in outer]}
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not body.has_answered:
            await body.refuse(body.refusal)
        return None


class CountedBody:
    """The two ends of a request, counting what comes in; nothing of the application's goes out once it is refused.

    refusal: why the body cannot be read further.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int, *, is_packed: bool) -> None:
        self._scope, self._receive, self._send, self._max_bytes = scope, receive, send, max_bytes
        self._gzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if is_packed else None
        self._n_bytes = self._n_unpacked = 0
        self.refusal: ApiError | None = None
        self.has_answered = self.is_read = False

    async def receive(self) -> Message:
        """The next message, unpacked; raises BodyRefused once the body is too large or broken."""
        if self.refusal is None:
            message = await self._next()
            if self._n_bytes > self._max_bytes:
                self.refusal = self.too_large()
            elif self._gzip is not None and message["type"] == "http.request":
                message = {**message, "body": self._unpacked(self._gzip, message.get("body", b""))}
        if self.refusal is not None:
            raise BodyRefused
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.has_answered:
            return
        self.has_answered = True
        await self._send(message)

    def too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes} bytes (--max_body_bytes), which is the limit here"
        return ApiError(413, message, code="body_too_large")

    async def refuse(self, error: ApiError) -> None:
        """Answer with this error."""

        async def begin(part: Message) -> None:
            await self._send({**part, "more_body": True} if part["type"] == "http.response.body" else part)

        # Told at once, for those who read while they send; ended later, for those who send all of it first.
        await send_error(self._scope, begin, error)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drain(), DRAIN_SECONDS)
        await self._send({"type": "http.response.body", "body": b""})

    def _unpacked(self, gzip: Any, packed: bytes) -> bytes:
        """What these bytes unpack to, never much more than the limit; notes the refusal of what cannot be read."""
        try:
            found: bytes = gzip.decompress(packed, self._max_bytes - self._n_unpacked + 1)
        except zlib.error:
            self.refusal = ApiError(400, "the body is not gzip, as its Content-Encoding says", code="invalid_gzip")
            return b""
        self._n_unpacked += len(found)
        if self._n_unpacked > self._max_bytes:
            self.refusal = self.too_large()
        elif gzip.unused_data or (self.is_read and not gzip.eof):
            words = "goes on behind its end" if gzip.eof else "is cut off"
            self.refusal = ApiError(400, f"the gzip of the body {words}", code="invalid_gzip")
        return found

    async def _drain(self) -> None:
        """Read and forget what is left."""
        while not self.is_read:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._n_bytes += len(message.get("body", b""))
        self.is_read = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class BodyRefused(Exception):
    """Ends the reading of a body; `BodyLimit` answers."""
