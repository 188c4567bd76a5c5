"""Paths, methods, base URLs that are not quite right, packed bodies, pages of other origins: through a real server."""

from __future__ import annotations

import gzip
import json

import pytest

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import Running, chat_body, serving
from tests.serve.api.test_errors import CHAT, shaped

PATHS = {"/health": "GET", "/v1/models": "GET", "/v1/models/tiny": "GET", CHAT: "POST", "/v1/completions": "POST",
         "/v1/embeddings": "POST", "/tokenize": "POST", "/detokenize": "POST"}  # fmt: skip


def test_paths_and_methods(server: Running) -> None:
    with server.client() as client:
        for path in (
            "/",
            "/v1",
            "/v1/",
            "/v1/nothing",
            "/nothing",
            "/health/",
            "/v1/chat",
            "/v1/chat/completions/",
            "/docs",
        ):
            for method in ("GET", "POST"):
                assert shaped(client.request(method, path), 404)["param"] in (None, "model")
        for path, method in PATHS.items():
            allowed = "GET, HEAD, OPTIONS" if method == "GET" else "POST, OPTIONS"
            for other in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - set(allowed.split(", ")):
                answer = client.request(other, path)
                assert answer.status_code == 405
                assert other == "HEAD" or shaped(answer, 405)["code"] == "method_not_allowed"
                assert answer.headers["allow"] == allowed
            options = client.options(path)
            assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")


def test_head_is_get_without_a_body(server: Running) -> None:
    with server.client() as client:
        for path in ("/health", "/v1/models", "/v1/models/tiny", "/v1/models/none", "/v1/nothing", "/nothing"):
            head, get = client.head(path), client.get(path)
            assert head.status_code == get.status_code
            assert head.headers["content-length"] == get.headers["content-length"]
            assert head.content == b""


@pytest.mark.parametrize(
    ("path", "hint"),
    [("/chat/completions", "/v1/chat/completions"), ("/completions", "/v1/completions"), ("/models", "/v1/models"),
     ("/embeddings", "/v1/embeddings"), ("/models/tiny", "/v1/models"), ("/v1/v1/models", "/v1/models"),
     ("/v1/v1/chat/completions", "/v1/chat/completions"), ("/v1/chat/completions/", "/v1/chat/completions"),
     ("/v1//chat/completions", "/v1/chat/completions"), ("//chat/completions", "/v1/chat/completions"),
     ("/api/v1/chat/completions", "/v1/chat/completions"), ("/openai/chat/completions", "/v1/chat/completions"),
     ("/v1/engines/tiny/embeddings", "/v1/embeddings"), ("/v1", "/v1/chat/completions"), ("/", "/v1/chat/completions"),
     ("/responses", "/v1/responses"), ("/v1/audio/speech", "/openapi.json")],
)  # fmt: skip
def test_a_wrong_base_url_is_told_the_right_path(server: Running, path: str, hint: str) -> None:
    with server.client() as client:
        for method in ("GET", "POST", "OPTIONS"):
            error = shaped(client.request(method, server.url + path), 404)
            assert (error["code"], hint in error["message"]) == ("not_found", True)
            assert ("ends with /v1" in error["message"]) == (hint.startswith("/v1/") and path not in ("/", "/v1"))


def test_gzipped_requests_are_answered(server: Running) -> None:
    raw = json.dumps(chat_body()).encode()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    with server.client() as client:
        answer = client.post(CHAT, content=gzip.compress(raw), headers=headers)
        assert answer.json()["choices"] == client.post(CHAT, json=chat_body()).json()["choices"]
        assert shaped(client.post(CHAT, content=raw, headers=headers), 400)["code"] == "invalid_gzip"
        bomb = gzip.compress(b" " * (LimitOptions().max_body_bytes + 1))
        assert shaped(client.post(CHAT, content=bomb, headers=headers), 413)["code"] == "body_too_large"
        for encoding in ("br", "deflate"):
            refused = client.post(CHAT, content=raw, headers=headers | {"content-encoding": encoding})
            assert shaped(refused, 415)["code"] == "unsupported_content_encoding"
            assert refused.headers["accept-encoding"] == "gzip"


def test_a_page_of_another_origin_is_told_what_to_do(engine: InferenceEngine) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with serving(engine, LimitOptions()) as server, server.client() as client:
        error = shaped(client.options(CHAT, headers=asks), 403)
        assert "with python tools/serve.py --allowed_origins https://page.example" in error["message"]
    options = ServeOptions(allowed_origins="https://Page.example/", api_key="sesame")
    with serving(engine, LimitOptions(), options) as server, server.client() as client:
        assert client.options(CHAT, headers=asks).headers["access-control-allow-origin"] == "https://page.example"
        refused = client.post(CHAT, json=chat_body(), headers={"origin": "https://page.example"})
        assert shaped(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://page.example"  # so that the page can read it
        error = shaped(client.options(CHAT, headers=asks | {"origin": "https://other.example"}), 403)
        assert "add https://other.example to python tools/serve.py --allowed_origins" in error["message"]
