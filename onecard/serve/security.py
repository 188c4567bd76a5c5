"""Who may talk to this machine over the network; the same for the pages and the API.

Layers around any ASGI application. They look at addresses, names, keys and sizes. They do not know pages, models or
what a request asks for. Why each is there:

- Host: a foreign page can make its own name point to 127.0.0.1 ("DNS rebinding"); the browser then believes that this
  server belongs to that page. The Host header still names the page's machine, so only known names get through.
- Origin: a foreign page may send a POST to 127.0.0.1 without being able to read the answer; it would use the card.
- Key: compared in constant time, on every path but /health.
- Body: its size is limited (`body_limit.py`).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onecard.config.addresses import is_address, is_loopback, plain_host, plain_origin, split_list
from onecard.installation import command
from onecard.serve.body_limit import BodyLimit
from onecard.serve.http_error import NOTE_KEY, ApiError, send_error
from onecard.serve.keys import RequestRates, digest_of, name_of

OPEN_PATHS = ("/health",)
QUERY = "/query/"  # serve --simple: the one GET that uses the card
COUNTED_PATHS = ("/v1/", "/tokenize", "/detokenize")  # whose POST requests --rate_limit counts, beside / and QUERY
KEY_NAME = "onecard.key"  # of a scope: the name of the key that came with the request
READING_METHODS = ("GET", "HEAD", "OPTIONS")
STANDARD_PORTS = (":80", ":443")
CLOSED = "pages of other origins may not use this server; open its own page"
POLICY_VIOLATION = 1008  # code of a refused websocket
# Browsers are not to guess types, not to show the pages inside foreign ones, and not to pass the address on.
PLAIN_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
)


@dataclass(frozen=True)
class NetworkRules:
    """Who may come in. Lists are texts with commas, as they are typed.

    host: the address that is listened on. key: None for no key. keys: names and SHA-256 digests of further ones.
    max_body_bytes: of one request. requests_per_minute: of one key, or of one address without keys; 0: no limit.
    is_closed: what a foreign page has a browser read is refused as well; it may only lead to the page at /.
    """

    host: str = "127.0.0.1"
    allowed_hosts: str = ""
    allowed_origins: str = ""
    key: str | None = None
    max_body_bytes: int = 8_000_000
    keys: Mapping[str, bytes] = field(default_factory=dict)
    requests_per_minute: int = 0
    is_closed: bool = False

    @property
    def known_keys(self) -> dict[str, bytes]:
        """Digests of all keys by name; the one without a name is `key`."""
        return {**self.keys, **({"": digest_of(self.key)} if self.key is not None else {})}


class Protection:
    """All layers around an application; `app.add_middleware(Protection, rules=...)`, or `Protection(app, rules)`."""

    def __init__(self, app: ASGIApp, rules: NetworkRules) -> None:
        origins = [plain_origin(origin) for origin in split_list(rules.allowed_origins)]
        app = BodyLimit(app, rules.max_body_bytes)
        if rules.requests_per_minute:
            app = RateLimit(app, RequestRates(rules.requests_per_minute))
        if rules.known_keys:
            app = KeyCheck(app, rules.known_keys)
        if origins:
            # Methods are the paths' matter: they refuse in OpenAI's shape. Pages on the internet that reach into a
            # private network are asked for that by browsers.
            app = CORSMiddleware(
                app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], allow_private_network=True,
                expose_headers=["retry-after"],
            )  # fmt: skip
        app = OriginCheck(app, origins, is_closed=rules.is_closed)
        app = HostCheck(app, rules.host, [plain_host(name) for name in split_list(rules.allowed_hosts)])
        self._app = AddedHeaders(app, PLAIN_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class HostCheck:
    """Lets only requests through that were sent to a name of this server.

    bound to 127.0.0.1, allowed "box.lan":  localhost:8000, [::1]:9, box.lan  yes;  evil.example  403;  none  400
    Bound to every address (0.0.0.0, ::) any literal address is right as well: only names can be made to lie.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str]) -> None:
        self._app = app
        self._names = {"localhost", host.lower()} | {host_name(name) or name.lower() for name in allowed}
        self._any_address = is_address(host) and ipaddress.ip_address(host).is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        hosts = Headers(raw=scope["headers"]).getlist("host")
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            return await refuse(scope, send, ApiError(400, "the Host header is missing or broken", code="bad_host"))
        if not (name in self._names or is_loopback(name) or (self._any_address and is_address(name))):
            message = f"this server is not called {name!r}; if it should be, start it with --allowed_hosts {name}"
            return await refuse(scope, send, ApiError(403, message, code="host_not_allowed"))
        return await self._app(scope, receive, send)


class OriginCheck:
    """Refuses what a foreign page in a browser sends: state-changing requests and websockets with another Origin.

    So is the question that browsers ask before (OPTIONS, "preflight"): its answer is where a page's author looks first.
    Programs send no Origin and are not concerned. Behind a proxy that speaks TLS the scheme differs from what is seen
    here, so host and port are compared.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str], *, is_closed: bool = False) -> None:
        self._app, self._is_closed = app, is_closed
        self._allowed = {origin.rstrip("/").lower() for origin in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(raw=scope.get("headers", []))  # of a lifespan: none
        asks = scope["type"] == "http" and scope["method"] == "OPTIONS"
        asks = asks and "access-control-request-method" in headers
        guarded = scope["type"] == "http" and self._guards(scope, headers)
        changes = scope["type"] == "websocket" or (scope["type"] == "http" and scope["method"] not in READING_METHODS)
        origins = headers.getlist("origin") if changes or asks or guarded else []
        # The image of a foreign page comes without Origin: https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Sec-Fetch-Site
        if guarded and not origins and set(headers.getlist("sec-fetch-site")) & {"cross-site", "same-site"}:
            allowed = f"an origin of {command('serve')} --allowed_origins"
            message = (
                CLOSED if self._is_closed else f"pages of other origins may not ask here; send POST, from {allowed}"
            )
            return await refuse(scope, send, ApiError(403, message, code="origin_not_allowed"))
        # A page that asks stands on another origin, even where host and port are ours.
        hosts = headers.getlist("host") if origins and not asks else []
        for origin in origins:
            if not self._trusts(origin.lower(), hosts):
                return await refuse(scope, send, ApiError(403, self._advice(origin), code="origin_not_allowed"))
        return await self._app(scope, receive, send)

    def _guards(self, scope: Scope, headers: Headers) -> bool:
        """Whether reading this is refused to foreign pages, too."""
        is_link = scope["path"] == "/" and headers.getlist("sec-fetch-mode") == ["navigate"]
        return scope["path"].startswith(QUERY) or (self._is_closed and not is_link)

    def _advice(self, origin: str) -> str:
        if self._is_closed:
            return CLOSED
        try:
            name = plain_origin(origin)
        except ValueError:  # "null" of a file or a frame without rights, or nonsense
            option = f"{command('serve')} --allowed_origins names those that may; this one has no name: "
            option += "serve the page over HTTP"
        else:
            flag = f"{command('serve')} --allowed_origins"  # chat has none
            option = f"add {name} to {flag}" if self._allowed else f"allow this one with {flag} {name}"
        return f"pages of other origins may not call this server; {option}"

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

    def __init__(self, app: ASGIApp, keys: Mapping[str, bytes]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = [given_key(value) for value in Headers(raw=scope["headers"]).getlist("authorization")]
        name = name_of(given[0], self._keys) if len(given) == 1 else None
        if name is not None:
            if NOTE_KEY in scope:
                scope[NOTE_KEY].key = name
            return await self._app({**scope, KEY_NAME: name}, receive, send)
        headers = {"www-authenticate": 'Basic realm="OneCard", charset="UTF-8"'}
        message = "a key is needed here: send it as `Authorization: Bearer KEY`, or as the password of Basic"
        return await refuse(scope, send, ApiError(401, message, code="invalid_api_key", headers=headers))


class RateLimit:
    """Answers 429 to a key, or to an address where no keys are asked for, that sends more requests than it may."""

    def __init__(self, app: ASGIApp, rates: RequestRates) -> None:
        self._app, self._rates = app, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_counted(scope["method"], scope["path"]):
            client = scope.get(KEY_NAME) or (scope.get("client") or ("",))[0]
            if wait := self._rates.seconds_to_wait(client):
                message = f"too many requests; the next one may come in {wait:.1f} seconds (--rate_limit)"
                headers = {"retry-after": str(math.ceil(wait))}
                return await refuse(scope, send, ApiError(429, message, code="rate_limit_exceeded", headers=headers))
        return await self._app(scope, receive, send)


def _is_counted(method: str, path: str) -> bool:
    return path.startswith(QUERY) or (method == "POST" and (path == "/" or path.startswith(COUNTED_PATHS)))


class AddedHeaders:
    """Adds headers to every answer; where one is there already it stays, or with `replaces` gives way."""

    def __init__(self, app: ASGIApp, headers: Sequence[tuple[bytes, bytes]], *, replaces: bool = False) -> None:
        self._app, self._headers, self._replaces = app, headers, replaces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = list(message.get("headers", []))
                first, second = (self._headers, there) if self._replaces else (there, self._headers)
                known = {name for name, _ in first}
                message = {**message, "headers": [*first, *(header for header in second if header[0] not in known)]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def refuse(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with this error; a websocket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message[:100]})
    else:
        await send_error(scope, send, error)


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
