"""Who may talk to this machine over the network; the same for the pages and the API.

Layers around any ASGI application. They look at addresses, names, keys and sizes. They do not know pages, models or
what a request asks for. Why each is there:

- Host: a foreign page can make its own name point to 127.0.0.1 ("DNS rebinding"); the browser then believes that this
  server belongs to that page. The Host header still names the page's machine, so only known names get through.
- Origin: a foreign page may send a POST to 127.0.0.1 without being able to read the answer; it would use the card.
- Key: compared in constant time, on every path but /health.
- Body: counted while it is being read, because the length that a client announces may be missing or wrong.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from onecard.config_talk import is_loopback
from onecard.talk.api_errors import ApiError, send_error

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

OPEN_PATHS = ("/health",)
READING_METHODS = ("GET", "HEAD", "OPTIONS")
STANDARD_PORTS = (":80", ":443")
POLICY_VIOLATION = 1008  # code of a refused websocket
DRAIN_SECONDS = 30  # so long a body that is too large is still read: who is cut off while sending reads no answer


@dataclass(frozen=True)
class NetworkRules:
    """Who may come in. Lists are texts with commas, as they are typed.

    host: the address that is listened on. key: None for no key. max_body_bytes: of one request.
    """

    host: str = "127.0.0.1"
    allowed_hosts: str = ""
    allowed_origins: str = ""
    key: str | None = None
    max_body_bytes: int = 2_000_000


class Protection:
    """All layers around an application; `app.add_middleware(Protection, rules=...)`, or `Protection(app, rules)`."""

    def __init__(self, app: App, rules: NetworkRules) -> None:
        origins = split_list(rules.allowed_origins)
        app = BodyLimit(app, rules.max_body_bytes)
        if rules.key is not None:
            app = KeyCheck(app, rules.key)
        app = OriginCheck(app, origins)
        if origins:
            app = CORSMiddleware(
                app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
                expose_headers=["retry-after"],
            )  # fmt: skip
        app = HostCheck(app, rules.host, split_list(rules.allowed_hosts))
        self._app = PlainHeaders(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class HostCheck:
    """Lets only requests through that were sent to a name of this server.

    bound to 127.0.0.1, allowed "box.lan":  localhost:8000, [::1]:9, box.lan  yes;  evil.example  403;  none  400
    Bound to every address (0.0.0.0, ::) any literal address is right as well: only names can be made to lie.
    """

    def __init__(self, app: App, host: str, allowed: Iterable[str]) -> None:
        self._app = app
        self._names = {"localhost", host.lower()} | {host_name(name) or name.lower() for name in allowed}
        self._any_address = is_wildcard(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        hosts = headers_of(scope, b"host")
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            return await refuse(scope, send, ApiError(400, "the Host header is missing or broken", code="bad_host"))
        if not self._knows(name):
            message = f"this server is not called {name!r}; if it should be, start it with --allowed_hosts {name}"
            return await refuse(scope, send, ApiError(403, message, code="host_not_allowed"))
        return await self._app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        return name in self._names or is_loopback(name) or (self._any_address and is_address(name))


class OriginCheck:
    """Refuses what a foreign page in a browser sends: state-changing requests and websockets with another Origin.

    Programs send no Origin and are not concerned. Behind a proxy that speaks TLS the scheme differs from what is seen
    here, so host and port are compared.
    """

    def __init__(self, app: App, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = {origin.rstrip("/").lower() for origin in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        changes = scope["type"] == "websocket" or (scope["type"] == "http" and scope["method"] not in READING_METHODS)
        origins = headers_of(scope, b"origin") if changes else []
        hosts = headers_of(scope, b"host") if origins else []
        if any(not self._trusts(origin.lower(), hosts) for origin in origins):
            message = "pages of other origins may not call this server; --allowed_origins names those that may"
            return await refuse(scope, send, ApiError(403, message, code="origin_not_allowed"))
        return await self._app(scope, receive, send)

    def _trusts(self, origin: str, hosts: list[str]) -> bool:
        if origin in self._allowed:
            return True
        scheme, separator, place = origin.partition("://")
        return (
            bool(separator) and scheme in ("http", "https") and [plain_place(h) for h in hosts] == [plain_place(place)]
        )


class KeyCheck:
    """Asks for the key on every path but /health: `Authorization: Bearer KEY`, or Basic with the key as password.

    Basic is what a browser can do, so the page on the same port opens after one question.
    """

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode("utf-8")).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS or self._is_known(scope):
            return await self._app(scope, receive, send)
        headers = {"www-authenticate": 'Basic realm="OneCard", charset="UTF-8"'}
        message = "a key is needed here: send it as `Authorization: Bearer KEY`, or as the password of Basic"
        return await refuse(scope, send, ApiError(401, message, code="invalid_api_key", headers=headers))

    def _is_known(self, scope: Scope) -> bool:
        given = [given_key(value) for value in headers_of(scope, b"authorization")]
        # Digests of equal length: the time of comparing tells nothing, not even how long the key is.
        return len(given) == 1 and hmac.compare_digest(hashlib.sha256(given[0]).digest(), self._digest)


class BodyLimit:
    """Answers 413 to a body of more than `max_bytes`, announced or not."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = CountedBody(receive, send, self._max_bytes)
        announced = headers_of(scope, b"content-length")
        if any(length.isdigit() and int(length[:20]) > self._max_bytes for length in announced):
            return await self._refuse(scope, body, send)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.is_too_large:
                raise
        if body.is_too_large and not body.has_answered:
            await self._refuse(scope, body, send)
        return None

    async def _refuse(self, scope: Scope, body: CountedBody, send: Send) -> None:
        async def begin(part: Message) -> None:
            await send({**part, "more_body": True} if part["type"] == "http.response.body" else part)

        message = f"the body is larger than {self._max_bytes} bytes (--max_body_bytes), which is the limit here"
        # Told at once, for those who read while they send; ended later, for those who send all of it first.
        await send_error(scope, begin, ApiError(413, message, code="body_too_large"))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(body.drain(), DRAIN_SECONDS)
        await send({"type": "http.response.body", "body": b""})


class CountedBody:
    """The two ends of a request, counting what comes in; nothing of the application's goes out once it is too much."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._n_bytes = 0
        self.is_too_large = self.has_answered = self.is_read = False

    async def receive(self) -> Message:
        """The next message; raises BodyTooLarge when this one goes over the limit."""
        if self.is_too_large:
            raise BodyTooLarge
        message = await self._next()
        if self._n_bytes > self._max_bytes:
            self.is_too_large = True
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        if self.is_too_large and not self.has_answered:
            return
        self.has_answered = True
        await self._send(message)

    async def drain(self) -> None:
        """Read and forget what is left."""
        while not self.is_read:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._n_bytes += len(message.get("body", b""))
        self.is_read = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class BodyTooLarge(Exception):
    """Ends the reading of a body; `BodyLimit` answers."""


class PlainHeaders:
    """Tells browsers not to guess types, not to show the pages inside foreign ones, not to pass the address on."""

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"SAMEORIGIN"),
        (b"referrer-policy", b"same-origin"),
    )

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message.get("headers", [])}
                added = [header for header in self.HEADERS if header[0] not in known]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def refuse(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with this error; a websocket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message[:100]})
    else:
        await send_error(scope, send, error)


def headers_of(scope: Scope, name: bytes) -> list[str]:
    """All values of a header; bytes that are no ASCII stay distinguishable and match nothing."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def given_key(header: str) -> bytes:
    """The key in an Authorization header, b"" where there is none. "Basic " + base64("me:KEY") -> b"KEY"."""
    scheme, _, value = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def host_name(header: str) -> str | None:
    """The name in a Host header without port and brackets, in lower case; None for what is none.

    "LocalHost:8000" -> "localhost"    "[::1]:80" -> "::1"    "a@b", "", "x:y" -> None
    """
    try:
        parts = urlsplit(f"//{header}")
        name, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError:
        return None
    is_plain = name is not None and "@" not in header and header.isascii() and parts.netloc == header
    return name if is_plain and not parts.path and not any(sign.isspace() for sign in header) else None


def plain_place(place: str) -> str:
    """host:port in lower case, without a port that browsers leave out."""
    place = place.lower()
    for port in STANDARD_PORTS:
        place = place.removesuffix(port)
    return place


def is_address(name: str) -> bool:
    """True for a literal IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_wildcard(host: str) -> bool:
    """True for the address that stands for all of this machine's."""
    return is_address(host) and ipaddress.ip_address(host).is_unspecified


def split_list(text: str) -> list[str]:
    """The names in a text with commas: "a, b" -> ["a", "b"]."""
    return [name for name in (part.strip() for part in text.split(",")) if name]
