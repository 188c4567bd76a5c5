"""What an attacker, a foreign page or a broken client sends, on every route of the application, so on a new one too."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from onecard.config.base_model import DEFAULT_BASE
from onecard.config.studio import StudioOptions
from onecard.studio.app import studio_app
from onecard.studio.context import StudioContext, open_context
from onecard.studio.folders import is_portable
from tests.serve.bare_server import listening
from tests.serve.test_connections import FOREVER, get, is_ended, limits
from tests.studio.conftest import Client
from tests.studio.test_app import calls

HOST = "127.0.0.1:7861"
STARTS_TORCH = "/api/plan/machine"  # in a process of its own
STATIC = [("GET", "/static/studio.js"), ("HEAD", "/static/studio.js"), ("GET", "/static/nowhere")]
NAMES = [
    "..\\x", "../x", "..", ".", ".hidden", "CON", "nul.jsonl", "aux", "COM1.x", "com¹", "a\0b", "a\nb", "x" * 300,
    "字" * 90, "𠀀" * 79, "a\u202etxt.exe", "a/b", "/abs", "a.", "a ", " ", "", "~", "$(id)", "C:x", "\ud800",
    "e\u0301.jsonl", "\uff0e\uff0e/x", "a\u200b", "x.jsonl/..", "-rf",
]  # fmt: skip


def every_call(app: Any) -> list[tuple[str, str]]:
    return [*calls(app), *STATIC]


def with_body(app: Any) -> list[tuple[str, str]]:
    return [(method, path) for method, path in calls(app) if method in ("POST", "PUT", "PATCH")]


def answer(address: tuple[str, int], sent: bytes, pieces: Iterable[bytes] = ()) -> bytes:
    """All that comes back for these bytes; a client that is cut off while it sends reads what there is."""
    with socket.create_connection(address, timeout=60) as client:
        try:
            client.sendall(sent)
            for piece in pieces:
                client.sendall(piece)
        except ConnectionError:
            pass
        found = b""
        while b"\r\n\r\n" not in found:
            more = client.recv(65536)
            if not more:
                break
            found += more
    return found


def head(method: str, path: str, *more: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {HOST}", "Connection: close", *more, "", ""]).encode()


def status(found: bytes) -> int:
    return int(found.split()[1])


def test_a_foreign_page_may_neither_change_nor_read_anything(ask: Client) -> None:
    listed = every_call(ask.app)
    assert len(listed) > 50
    for method, path in listed:
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
                        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
                        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}):  # fmt: skip
            found = ask.raw(method, path, headers=headers)
            assert found.status_code == 403, (method, path, headers, found.text)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask.raw("GET", "/", headers=link).status_code == 200, "a link may lead to the page"
    assert ask.raw("GET", "/api/queue", headers=link).status_code == 403
    told = ask("POST", "/api/queue", {}, headers={"origin": "http://evil.example"})[1]["error"]["message"]
    assert "serve" not in told.split(), "no option of another program is named"
    own = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "origin": f"http://{HOST}"}
    assert (
        ask("GET", "/api/queue", headers=own)[0]
        == ask("POST", "/api/queue/hold", {"is_held": 1}, headers=own)[0]
        == 200
    )


def test_no_route_answers_to_another_name(ask: Client) -> None:
    """DNS rebinding: the browser believes that this machine is the page's."""
    for method, path in every_call(ask.app):
        for host in ("evil.example", "evil.example:7861", "127.0.0.1.evil.example", "localhost.evil.example"):
            assert ask.raw(method, path, headers={"host": host}).status_code == 403, (method, path, host)


def test_no_route_takes_the_key_of_an_earlier_start(options: StudioOptions, context: StudioContext) -> None:
    options.api_key = "of the first start"
    key = {"authorization": f"Bearer {options.api_key}"}
    assert Client(studio_app(options, context), key)("GET", "/api/queue")[0] == 200
    options.api_key = "of the second start"
    app = studio_app(options, open_context(options))
    for method, path in every_call(app):
        expected = 200 if path == "/health" else 401
        assert Client(app, key).raw(method, path).status_code == expected, (method, path)


def test_requests_that_never_end_are_ended_on_every_route_while_others_are_served(
    options: StudioOptions, context: StudioContext, capsys: pytest.CaptureFixture[str]
) -> None:
    app, bounds = studio_app(options, context), limits(head_seconds=0.5, body_seconds=0.5)
    half = [f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nX-Long: ".encode() for method, path in every_call(app)]
    kind = "Content-Type: application/json"
    half += [head(method, path, kind, "Content-Length: 900000") + b"{" for method, path in with_body(app)]
    with listening(app, bounds) as address:
        clients = [socket.create_connection(address, timeout=60) for _ in half]
        for client, sent in zip(clients, half, strict=True):
            client.sendall(sent)
        assert get(address, "/").startswith(b"HTTP/1.1 200 ")
        for client in clients:
            with client:
                while not is_ended(client):
                    pass
        bounds.head_seconds = bounds.body_seconds = FOREVER
        assert get(address, "/api/queue").startswith(b"HTTP/1.1 200 ")
    assert list(context.upload_root.iterdir()) == []


def test_idle_connections_do_not_keep_a_page_from_its_news(options: StudioOptions, context: StudioContext) -> None:
    app = studio_app(options, context)
    with listening(app, limits(max_connections=30)) as address:
        with socket.create_connection(address, timeout=60) as page:
            page.sendall(head("GET", "/api/events"))
            while b"hello" not in page.recv(65536):
                pass
            idle = [socket.create_connection(address, timeout=60) for _ in range(300)]
            assert get(address, "/api/runs").startswith(b"HTTP/1.1 200 ")
            context.events.publish("run", {"id": "told"})
            heard = b""
            while b"told" not in heard:
                more = page.recv(65536)
                assert more, "the page's stream has ended"
                heard += more
            for client in idle:
                client.close()
        context.events.close()


def test_bodies_of_any_size_are_refused_in_bounded_memory_on_every_route(
    options: StudioOptions, context: StudioContext
) -> None:
    """Announced, sent without end, and packed."""
    app, most = studio_app(options, context), 12_000_000
    bomb = gzip.compress(b"[" * 30_000_000)
    kind = "Content-Type: application/json"
    with listening(app, limits()) as address:
        assert get(address, "/").startswith(b"HTTP/1.1 200 ")
        tracemalloc.start()
        for method, path in every_call(app):
            found = answer(address, head(method, path, kind, "Content-Length: 10737418240"))
            assert status(found) == 413, (method, path, found)
        for method, path in with_body(app):
            pieces = (b"10000\r\n%s\r\n" % (b"[" * 65536) for _ in range(60))
            found = answer(address, head(method, path, kind, "Transfer-Encoding: chunked"), pieces)
            assert 400 <= status(found) < 500, (method, path, found)
            packed = head(method, path, kind, "Content-Encoding: gzip", f"Content-Length: {len(bomb)}") + bomb
            assert 400 <= status(answer(address, packed)) < 500, (method, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert get(address, "/api/queue").startswith(b"HTTP/1.1 200 ")
        context.events.close()
    assert peak < most
    assert list(context.upload_root.iterdir()) == []


def test_no_route_becomes_a_websocket(options: StudioOptions, context: StudioContext) -> None:
    app = studio_app(options, context)
    upgrade = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="]
    with listening(app, limits()) as address:
        for path in dict.fromkeys(path for _, path in every_call(app) if path not in ("/api/events", STARTS_TORCH)):
            assert status(answer(address, head("GET", path, *upgrade))) != 101, path
        foreign = answer(address, head("GET", "/api/events", *upgrade, "Origin: http://evil.example"))
        assert status(foreign) == 403
        context.events.close()


@pytest.fixture
def run(context: StudioContext) -> Path:
    found = context.output_root / "a"
    found.mkdir()
    (found / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (found / "adapter_config.json").write_text("{}", encoding="utf-8")
    return found


def test_no_name_makes_something_elsewhere_or_what_another_system_cannot_have(
    ask: Client, context: StudioContext, run: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data" / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    options = {"data_path": str(data), "model_path": DEFAULT_BASE}
    taken = 0
    for name in NAMES:
        for method, path, content in (
            ("PATCH", f"/api/runs/{run.name}", {"name": name}),
            ("POST", "/api/queue/check", {"options": options, "name": name}),
            ("POST", "/api/queue", {"options": options, "name": name}),
            ("POST", "/api/data/make/clean", {"sources": [{"name": str(data)}], "name": name}),
            ("POST", "/api/exports", {"kind": "adapter", "source": run.name, "name": name}),
        ):
            body = json.dumps(content).encode()  # with a surrogate alone in it, which JSON can write
            found = ask.raw(method, path, content=body, headers={"content-type": "application/json"})
            assert found.status_code < 500, (path, name, found.text)
            taken += found.status_code < 300
            if found.status_code == 200 and method == "PATCH" and found.json()["id"] != run.name:
                run = run.with_name(found.json()["id"])
        sent = quote(name.encode("utf-8", "surrogatepass"), safe="")
        put = ask.raw(
            "PUT", f"/api/data/uploads/{sent}", content=b"{}", headers={"content-type": "application/octet-stream"}
        )
        assert put.status_code < 500, (name, put.text)
    assert taken > 0, "some names are good"
    listed = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert {path.parts[0] for path in listed} == {"data", "out"} and len(list((tmp_path / "data").iterdir())) == 1
    queued = [entry["output"] for entry in ask("GET", "/api/queue")[1]["entries"]]
    for path in (*listed, *(Path(output).relative_to(tmp_path) for output in queued)):
        for part in path.parts:
            assert is_portable(part), path
            assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") or sign in '<>:"|?*\\' for sign in part), (
                path
            )
    for method, path in calls(ask.app):
        for name in NAMES if "/x" in path else ():
            sent = quote(name.encode("utf-8", "surrogatepass"), safe="")
            found = ask.raw(
                method, path.replace("/x", f"/{sent}"), **({} if method in ("GET", "DELETE") else {"json": {}})
            )
            assert found.status_code < 500, (method, path, name, found.text)


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_no_link_leads_out_of_the_folders(ask: Client, context: StudioContext, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    for name in ("rows.jsonl", "onecard.yaml", "log.jsonl"):
        (secret / name).write_text('{"instruction": "secret", "output": "secret", "step": 1}\n', encoding="utf-8")
    data = tmp_path / "data"
    (data / "inner").mkdir()
    (data / "inner" / "link.jsonl").symlink_to(secret / "rows.jsonl")
    (data / "folder").symlink_to(secret)
    (data / "good.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    (data / "within.jsonl").symlink_to(data / "good.jsonl")
    listed = ask("GET", f"/api/data/files?folder={quote(str(data))}")[1]["entries"]
    assert [entry["name"] for entry in listed] == ["inner", "good.jsonl", "within.jsonl"]
    assert ask("GET", f"/api/data/files?folder={quote(str(data / 'inner'))}")[1]["entries"] == []
    for name in (data, data / "inner", data / "inner" / "link.jsonl", data / "folder", data / "folder" / "rows.jsonl"):
        for path in ("/api/data/read", "/api/data/tokens", "/api/data/make/split"):
            asked = {"sources": [{"name": str(name)}], "model_path": DEFAULT_BASE, "numbers": [0], "name": "new"}
            status_code, told = ask("POST", path, asked)
            assert status_code == 403 and told["error"]["code"] == "outside_roots", (name, told)
    (context.output_root / "linked").symlink_to(secret)
    assert [row["id"] for row in ask("GET", "/api/runs")[1]["runs"]] == ["a"]
    for name in ("log.jsonl", "studio.log", "questions.jsonl", "onecard.yaml"):
        (run / name).unlink(missing_ok=True)
        (run / "studio.json").write_text("{}", encoding="utf-8")
        (run / name).symlink_to(secret / "rows.jsonl")
        for path in ("a", "a/log", "a/rows", "a/questions", "linked", "linked/rows"):
            assert ask("GET", f"/api/runs/{path}")[0] == 404, (name, path)
        assert ask("GET", "/api/runs")[1]["runs"] == []
        (run / name).unlink()
