"""Who may come in and what may be read: asked of every route of the application, so that a new one is asked too."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount, Route

from onecard.config.parsing import parse
from onecard.config.studio import StudioOptions
from onecard.errors import ConfigError
from onecard.serve.http_error import ApiError
from onecard.studio.app import studio_app
from onecard.studio.context import StudioContext
from onecard.studio.events import EventHub
from tests.studio.conftest import Client

# Texts that reach for what lies elsewhere, in a path or a body.
TRAVERSALS = ["..%2f..%2f..%2fetc%2fpasswd", "%2e%2e", "....//etc", "%00", "C%3A%5CWindows", "/etc/passwd"]


def calls(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every route, with a word in each place of a path."""
    found = []
    for route in app.routes:
        if isinstance(route, Route):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            found += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
        else:
            assert isinstance(route, Mount) and route.path == "/static"
    return found


def test_every_route_refuses_foreign_hosts_and_every_change_foreign_pages(ask: Client) -> None:
    listed = calls(ask.app)
    assert len(listed) >= 8
    for method, path in listed:
        assert ask(method, path, headers={"host": "evil.example"})[0] == 403, path
        if method != "GET":
            assert ask(method, path, headers={"origin": "http://evil.example"})[0] == 403, path
            assert ask(method, path, headers={"origin": "null"})[0] == 403, path


def test_every_body_must_be_json_of_a_bounded_size(ask: Client) -> None:
    """A form of a foreign page is sent without asking before; it cannot have this type."""
    bodies = [(method, path) for method, path in calls(ask.app) if method in ("POST", "PUT", "PATCH")]
    for method, path in bodies:
        form = ask.raw(method, path, content=b"a=1", headers={"content-type": "application/x-www-form-urlencoded"})
        assert form.status_code in (404, 415, 409), (path, form.text)
        bomb = gzip.compress(b"[" * 3_000_000)
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        assert ask.raw(method, path, content=bomb, headers=packed).status_code in (400, 404, 409, 413), path


def test_no_path_of_a_route_leads_elsewhere(ask: Client, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    for route in ask.app.routes:
        for text in TRAVERSALS:
            path = re.sub(r"\{[^}]*\}", text, getattr(route, "path", ""))
            for method in sorted(getattr(route, "methods", None) or ["GET"]):
                if path != getattr(route, "path", "") and method != "HEAD":
                    found = ask.raw(method, path, **({} if method in ("GET", "DELETE") else {"json": {}}))
                    assert found.status_code in (400, 403, 404, 405), (method, path, found.text)
                    assert "root:" not in found.text
    for text in ("..%2fapp.py", "../app.py", "vendor/..%2f..%2fapp.py"):
        assert ask.raw("GET", f"/static/{text}").status_code == 404


def test_the_page_forbids_scripts_of_others_and_frames(ask: Client) -> None:
    page = ask.raw("GET", "/")
    assert page.status_code == 200 and "<title>OneCard Studio" in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-frame-options"] == "DENY" and page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", page.text)


def test_a_key_is_asked_for_where_one_is_set(options: StudioOptions, context: StudioContext) -> None:
    options.api_key = "sesame"
    app = studio_app(options, context)
    assert Client(app)("GET", "/api/jobs")[0] == 401
    assert Client(app).raw("GET", "/").status_code == 401
    assert Client(app, {"authorization": "Bearer sesame"})("GET", "/api/jobs")[0] == 200
    assert Client(app)("GET", "/health") == (200, {"status": "ok"})


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (outside / "file").touch()
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "good").touch()
    safe_path = StudioContext.safe_path
    assert safe_path("good", [root]) == safe_path(str(root / "good"), [root]) == safe_path("./x/../good", [root])
    assert safe_path("new/file", [root]) == root / "new" / "file"
    for text in ("link/file", str(root / "link" / "file"), "../outside/file", str(outside), "/", "loop"):
        with pytest.raises(ApiError) as refused:
            print(safe_path(text, [root]))
        assert refused.value.status_code in (400, 403)
    for text in ("", " ", "a\0b", "x" * 5000, 5):
        with pytest.raises(ApiError):
            safe_path(text, [root])  # type: ignore[arg-type]


def test_errors_are_json_in_the_language_of_the_page(ask: Client, context: StudioContext) -> None:
    status, content = ask("GET", "/api/jobs/none", headers={"x-language": "zh"})
    assert status == 404 and content["error"]["message"] == "没有这个任务"
    assert ask("GET", "/api/jobs/none")[1]["error"]["message"] == "there is no such job"
    assert ask("GET", "/nowhere")[0] == 404


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError) as refused:
        parse(StudioOptions, ["--host", "0.0.0.0", "--data_root", "/no/such", "--upload_max_mb", "0"])
    assert {flag for flag, _ in refused.value.problems} == {"--host", "--data_root", "--upload_max_mb"}


def test_a_watcher_that_fails_is_told_once_and_keeps_no_other_back(capsys: pytest.CaptureFixture[str]) -> None:
    hub = EventHub()

    def broken() -> Any:
        yield "a", 1
        raise OSError("gone")

    assert hub._asked(broken) == hub._asked(broken) == [("a", 1)]
    assert capsys.readouterr().err.count("could not look for news: OSError: gone") == 1


def test_pages_are_sent_what_is_published_until_the_studio_ends() -> None:
    async def listen() -> list[str]:
        hub = EventHub()
        heard = []
        async for text in hub.stream():
            heard.append(text)
            if len(heard) == 1:
                assert hub.n_pages == 1
                hub.publish("run", {"loss": float("nan"), "name": "好\n"})
            else:
                hub.close()
        assert hub.n_pages == 0
        return heard

    hello, news = asyncio.run(listen())
    assert hello.startswith("retry: ") and news == 'event: run\ndata: {"loss": null, "name": "好\\n"}\n\n'
