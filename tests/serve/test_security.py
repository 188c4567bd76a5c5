"""Who may come in: names, origins, keys and sizes, asked of the bare layers without a server."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import socket
from typing import Any

import pytest

from onecard.config.addresses import plain_host, plain_origin
from onecard.serve import body_limit
from onecard.serve.body_limit import BodyLimit
from onecard.serve.keys import digest_of
from onecard.serve.security import (
    HostCheck,
    KeyCheck,
    NetworkRules,
    OriginCheck,
    Protection,
    given_key,
    host_name,
)
from tests.serve.bare_server import inside, listening

KEY = "sesame"


def ask(
    app: Any,
    *headers: tuple[str, str],
    method: str = "POST",
    path: str = "/v1/models",
    body: tuple[bytes, ...] = (b"",),
    kind: str = "http",
) -> list[dict[str, Any]]:
    """What an application sends to one request."""
    sent: list[dict[str, Any]] = []
    pieces = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
    pieces[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    asyncio.run(app({"type": kind, "method": method, "path": path, "headers": raw}, receive, send))
    return sent


def status(app: Any, *headers: tuple[str, str], **request: Any) -> int:
    return int(ask(app, *headers, **request)[0]["status"])


HERE = ("host", "127.0.0.1:8000")


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LocalHost:1", "127.0.0.1", "127.0.0.1:65535", "127.9.9.9", "[::1]", "[::1]:8000",
     "box.lan", "BOX.lan:9", "192.168.7.7:8000"],
)  # fmt: skip
def test_known_hosts(host: str) -> None:
    app = HostCheck(inside, "192.168.7.7", ["box.lan:8000"])
    assert status(app, ("host", host)) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.7.8",
     "notlocalhost",
     "foo.localhost", "0.0.0.0", "[::2]", "127.1", "xn--lcalhost-0fb"],
)  # fmt: skip
def test_foreign_hosts(host: str) -> None:
    assert status(HostCheck(inside, "192.168.7.7", ["box.lan"]), ("host", host)) == 403


@pytest.mark.parametrize(
    "hosts",
    [[], [""], ["localhost", "localhost"], ["localhost", "evil.example"], ["a@localhost"], ["localhost/evil"], [":80"],
     ["localhost:x"], ["localhost:99999"], ["local host"], ["[::1"], ["l\xf6calhost"], ["localhost#x"],
     ["localhost?x"]],
)  # fmt: skip
def test_missing_and_broken_hosts(hosts: list[str]) -> None:
    assert status(HostCheck(inside, "127.0.0.1", []), *[("host", host) for host in hosts]) == 400


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_bound_to_every_address_literal_ones_are_known_and_names_are_not(bound: str) -> None:
    app = HostCheck(inside, bound, [])
    assert status(app, ("host", "10.1.2.3:8000")) == status(app, ("host", "[fe80::1]:8000")) == 200
    assert status(app, ("host", "evil.example")) == 403
    assert status(HostCheck(inside, "10.1.2.3", []), ("host", "10.1.2.4")) == 403


def test_websockets_are_refused_before_they_open() -> None:
    app = Protection(inside, NetworkRules(key=KEY))
    key = ("authorization", f"Bearer {KEY}")
    assert ask(app, HERE, key, kind="websocket") == [{"type": "websocket.accept"}]
    for headers in (
        (("host", "evil.example"), key),
        (HERE,),
        (HERE, key, ("origin", "http://evil.example")),
    ):
        (message,) = ask(app, *headers, kind="websocket")
        assert (message["type"], message["code"]) == ("websocket.close", 1008)


@pytest.mark.parametrize(
    ("origin", "host"),
    [("http://127.0.0.1:8000", "127.0.0.1:8000"), ("http://localhost:8000", "LOCALHOST:8000"),
     ("https://box.lan", "box.lan"), ("https://box.lan", "box.lan:443"), ("http://box.lan:80", "box.lan"),
     ("https://page.example", "127.0.0.1:8000"), ("HTTPS://Page.Example", "127.0.0.1:8000")],
)  # fmt: skip
def test_own_and_allowed_origins(origin: str, host: str) -> None:
    app = OriginCheck(inside, ["https://page.example/"])
    assert status(app, ("host", host), ("origin", origin)) == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://127.0.0.1:9000", "http://localhost:8000", "127.0.0.1:8000",
     "file://127.0.0.1:8000", "https://page.example.evil.example", "http://page.example",
     "http://127.0.0.1:8000@evil.example"],
)  # fmt: skip
def test_foreign_origins_may_read_and_not_change(origin: str) -> None:
    app = OriginCheck(inside, ["https://page.example"])
    for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE"):
        assert status(app, HERE, ("origin", origin), method=method) == 403
    for method in ("GET", "HEAD", "OPTIONS"):
        assert status(app, HERE, ("origin", origin), method=method) == 200
    assert status(app, HERE) == 200  # a program


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header", ["Bearer sesame", "bearer sesame", "Bearer  sesame ", basic("me:sesame"), basic(":sesame")]
)
def test_the_key_in_its_two_forms(header: str) -> None:
    assert status(KeyCheck(inside, {"": digest_of(KEY)}), ("authorization", header)) == 200


@pytest.mark.parametrize(
    "header",
    ["Bearer sesam", "Bearer sesamee", "Bearer SESAME", "Bearer", "Bearer ", "sesame", "Basic sesame", "Basic !!!",
     basic("sesame"), basic("sesame:"), basic("me:sesame2"), "Digest sesame", "", "Bearer s\xe9same"],
)  # fmt: skip
def test_other_keys(header: str) -> None:
    first, second = ask(KeyCheck(inside, {"": digest_of(KEY)}), ("authorization", header))
    assert first["status"] == 401
    assert dict(first["headers"])[b"www-authenticate"].startswith(b"Basic ")
    error = json.loads(second["body"])["error"]
    assert error["code"] == "invalid_api_key"
    assert KEY not in json.dumps(error)


def test_two_authorization_headers_are_none() -> None:
    right = ("authorization", "Bearer sesame")
    assert status(KeyCheck(inside, {"": digest_of(KEY)}), right, right) == 401


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/models", "/v1/models/x", "/openapi.json", "/health/", "//health", "/healthy", "/nothing", "/x/health"],
)
def test_only_health_needs_no_key(path: str) -> None:
    app = KeyCheck(inside, {"": digest_of(KEY)})
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        assert status(app, path=path, method=method) == 401
        assert status(app, path="/health", method=method) == 200


def test_keys_that_are_no_ascii_match_nothing() -> None:
    assert given_key("Bearer \xff") != given_key("Bearer \xfe")
    assert given_key(basic("a:b:c")) == b"b:c"


@pytest.mark.parametrize(
    ("body", "announced", "expected"),
    [((b"x" * 100,), True, 200), ((b"x" * 60, b"y" * 40), False, 200), ((b"x" * 101,), True, 413),
     ((b"x" * 60, b"y" * 41), False, 413), ((b"x" * 30,) * 1000, False, 413), ((b"",), False, 200)],
)  # fmt: skip
def test_bodies_are_counted(body: tuple[bytes, ...], announced: bool, expected: int) -> None:
    headers = [("content-length", str(sum(map(len, body))))] if announced else []
    messages = ask(BodyLimit(inside, 100), *headers, body=body)
    assert messages[0]["status"] == expected
    if expected == 413:
        assert json.loads(messages[1]["body"])["error"]["code"] == "body_too_large"


def test_an_application_that_swallows_the_error_cannot_answer_for_it() -> None:
    async def swallows(scope: Any, receive: Any, send: Any) -> None:
        try:
            await inside(scope, receive, send)
        except Exception:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"bad"})

    assert [m.get("status") for m in ask(BodyLimit(swallows, 10), body=(b"x" * 11,))] == [413, None, None]


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_all_of_a_large_body_first_reads_why_it_is_refused(chunked: bool, connection: str) -> None:
    head = f"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n"
    n_pieces, piece = 2000, b"x" * 10_000
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {n_pieces * len(piece)}\r\n\r\n"
    sent = b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece
    app = Protection(inside, NetworkRules(max_body_bytes=10_000))
    with listening(app) as address, socket.create_connection(address, timeout=30) as client:
        client.sendall(head.encode())
        for _ in range(n_pieces):
            client.sendall(sent)
        client.sendall(b"0\r\n\r\n" if chunked else b"")
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_a_large_body_is_refused_before_it_has_ended_and_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "DRAIN_SECONDS", 0.2)
    head = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999\r\n\r\n"
    app = Protection(inside, NetworkRules(max_body_bytes=10_000))
    with listening(app) as address, socket.create_connection(address, timeout=30) as client:
        client.sendall(head)
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 413 ")


def test_errors_of_the_application_pass_through() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        ask(BodyLimit(fails, 10))


def test_the_layers_together() -> None:
    app = Protection(inside, NetworkRules(key=KEY, allowed_origins="https://page.example", max_body_bytes=10))
    key, page = ("authorization", f"Bearer {KEY}"), ("origin", "https://page.example")
    assert status(app, HERE, key) == 200
    # A foreign name is refused before the key is looked at, on /health as well.
    assert status(app, ("host", "evil.example"), path="/health") == 403
    assert status(app, HERE, key, ("origin", "http://evil.example")) == 403
    assert status(app, HERE, page) == 401
    assert status(app, HERE, key, body=(b"x" * 11,)) == 413
    preflight = ask(
        app, HERE, page, ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,x-stainless-os"), method="OPTIONS",
    )  # fmt: skip
    assert preflight[0]["status"] == 200
    headers = dict(preflight[0]["headers"])
    assert headers[b"access-control-allow-origin"] == b"https://page.example"
    assert b"x-stainless-os" in headers[b"access-control-allow-headers"]
    answer = dict(ask(app, HERE, key, page)[0]["headers"])
    assert answer[b"access-control-allow-origin"] == b"https://page.example"
    assert answer[b"x-content-type-options"] == b"nosniff"
    refused = dict(ask(app, ("host", "evil.example"))[0]["headers"])
    assert refused[b"x-frame-options"] == b"SAMEORIGIN"


def test_without_allowed_origins_no_page_is_told_that_it_may() -> None:
    app = Protection(inside, NetworkRules())
    for method in ("GET", "OPTIONS"):
        headers = dict(ask(app, HERE, ("origin", "https://page.example"), method=method)[0]["headers"])
        assert not [name for name in headers if name.startswith(b"access-control")]


PREFLIGHT = ("access-control-request-method", "POST")


@pytest.mark.parametrize(
    ("typed", "sent"),
    [("https://page.example", "https://page.example"), ("https://page.example/", "https://page.example"),
     ("HTTPS://Page.Example", "https://page.example"), ("https://page.example:443", "https://page.example"),
     ("http://page.example:80/", "http://page.example"), ("http://page.example:443", "http://page.example:443"),
     ("http://localhost:5173", "http://localhost:5173"), ("http://[::1]:3000/", "http://[::1]:3000"),
     ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"), ("tauri://localhost", "tauri://localhost"),
     ("https://b\u00fccher.example", "https://xn--bcher-kva.example")],
)  # fmt: skip
def test_origins_are_known_however_they_are_typed(typed: str, sent: str) -> None:
    assert plain_origin(typed) == plain_origin(sent) == sent
    app = Protection(inside, NetworkRules(allowed_origins=f"https://other.example, {typed}"))
    page = ("origin", sent)
    preflight = ask(app, HERE, page, PREFLIGHT, method="OPTIONS")[0]
    for answer in (preflight, ask(app, HERE, page)[0], ask(app, HERE, page, method="GET")[0]):
        assert answer["status"] == 200
        assert dict(answer["headers"])[b"access-control-allow-origin"] == sent.encode()


@pytest.mark.parametrize(
    ("typed", "form"),
    [("*", "https://example.org"), ("null", "https://example.org"), ("page.example", "https://page.example"),
     ("localhost:3000", "http://localhost:3000"), ("https://page.example/app/", "write https://page.example"),
     ("https://page.example?x=1", "write https://page.example"), ("https://*.example", "in full"),
     ("https://", "in full"), ("https://a b", "in full"), ("https://me@page.example", "in full"),
     ("https://page.example:port", "in full"), ("https://page.example:99999", "in full")],
)  # fmt: skip
def test_what_is_no_origin_is_refused_with_the_right_form(typed: str, form: str) -> None:
    with pytest.raises(ValueError, match=re.escape(form)):
        plain_origin(typed)


@pytest.mark.parametrize("typed", ["box.lan", "Box.LAN", "box.lan:8000", "http://box.lan", "https://box.lan:8443/"])
def test_host_names_are_known_however_they_are_typed(typed: str) -> None:
    assert plain_host(typed) == "box.lan"
    assert status(Protection(inside, NetworkRules(allowed_hosts=f"a.lan,{typed}")), ("host", "box.lan:8000")) == 200


def test_host_names_that_name_none() -> None:
    assert plain_host("::1") == plain_host("[::1]:8000") == "::1"
    for typed, form in (("*", "in full"), ("*.lan", "in full"), ("box.lan/x", "write box.lan"), ("http://", "in full")):
        with pytest.raises(ValueError, match=form):
            plain_host(typed)


@pytest.mark.parametrize("allowed", ["", "https://other.example"])
@pytest.mark.parametrize("key", [None, KEY])
def test_a_preflight_that_is_refused_says_what_to_do(allowed: str, key: str | None) -> None:
    app = Protection(inside, NetworkRules(allowed_origins=allowed, key=key))
    start, body = ask(app, HERE, ("origin", "https://page.example"), PREFLIGHT, method="OPTIONS")[:2]
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"]) == (403, "origin_not_allowed")
    assert "https://page.example" in error["message"] and "--allowed_origins" in error["message"]
    assert "other.example" not in error["message"]
    error = json.loads(ask(app, HERE, ("origin", "null"), PREFLIGHT, method="OPTIONS")[1]["body"])["error"]
    assert error["message"].endswith("serve the page over HTTP")


def test_a_preflight_comes_from_another_origin_even_where_host_and_port_are_ours() -> None:
    for allowed in ("", "https://other.example"):
        app = Protection(inside, NetworkRules(allowed_origins=allowed, allowed_hosts="box.lan"))
        sent = ask(app, ("host", "box.lan"), ("origin", "http://box.lan"), PREFLIGHT, method="OPTIONS")
        assert sent[0]["status"] == 403
        assert "http://box.lan" in json.loads(sent[1]["body"])["error"]["message"]
        assert status(app, ("host", "box.lan"), ("origin", "http://box.lan")) == 200


def test_an_allowed_page_may_reach_into_a_private_network() -> None:
    app = Protection(inside, NetworkRules(allowed_origins="https://page.example"))
    private = ("access-control-request-private-network", "true")
    answer = ask(app, HERE, ("origin", "https://page.example"), PREFLIGHT, private, method="OPTIONS")[0]
    assert dict(answer["headers"])[b"access-control-allow-private-network"] == b"true"


GZIPPED = ("content-encoding", "gzip")


def in_pieces(body: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(body[start : start + size] for start in range(0, len(body), size))


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "identity, gzip"])
def test_gzip_is_unpacked(encoding: str, size: int) -> None:
    body = in_pieces(gzip.compress(b"x" * 90, mtime=0), size)
    sent = ask(BodyLimit(inside, 100), ("content-encoding", encoding), ("content-length", "25"), body=body)
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"90")


def test_the_limit_holds_for_what_gzip_unpacks_to() -> None:
    for n_bytes, expected in ((100, 200), (101, 413), (100_000_000, 413)):
        packed = gzip.compress(b"x" * n_bytes, mtime=0)
        for size in (1000, len(packed)):
            sent = ask(BodyLimit(inside, 100 if n_bytes < 1000 else 200_000), GZIPPED, body=in_pieces(packed, size))
            assert sent[0]["status"] == expected
            if expected == 413:
                assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"


def test_little_of_a_gzip_bomb_is_unpacked() -> None:
    sizes: list[int] = []

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["more_body"]:
            sizes.append(len(message["body"]))

    packed = gzip.compress(b"x" * 50_000_000, mtime=0)
    assert ask(BodyLimit(reads, 60_000), GZIPPED, body=in_pieces(packed, 25))[0]["status"] == 413
    assert 0 < sum(sizes) <= 60_001


GZIP = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"{}", "not gzip"), (b"", "cut off"), (GZIP[:-4], "cut off"), (GZIP + b"x", "behind its end"),
     (GZIP[:-8] + bytes(8), "not gzip")],
)  # fmt: skip
def test_broken_gzip(body: bytes, words: str) -> None:
    start, answer = ask(BodyLimit(inside, 100), GZIPPED, body=(body,))[:2]
    error = json.loads(answer["body"])["error"]
    assert (start["status"], error["code"]) == (400, "invalid_gzip")
    assert words in error["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "br, gzip", "nonsense"])
def test_other_encodings_are_refused_with_the_one_that_is_known(encoding: str) -> None:
    start, answer = ask(BodyLimit(inside, 100), ("content-encoding", encoding), body=(b"x", b"y"))[:2]
    assert start["status"] == 415
    assert dict(start["headers"])[b"accept-encoding"] == b"gzip"
    assert json.loads(answer["body"])["error"]["code"] == "unsupported_content_encoding"


def test_lifespan_reaches_the_application() -> None:
    seen: list[str] = []

    async def remembers(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    app = Protection(remembers, NetworkRules(key=KEY))
    asyncio.run(app({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_host_names() -> None:
    assert host_name("LocalHost:8000") == "localhost"
    assert host_name("[::1]:80") == "::1"
