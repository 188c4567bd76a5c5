"""serve --simple: a question in a path or a small body, answered as the chat path does, under its limits."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from onecard.config.inference import LimitOptions, ServeOptions
from tests.serve.api.serving import Running, chat_body, open_tiny, serving

KEY = "sesame"
LIMITS = LimitOptions(max_answer_tokens=8, max_body_bytes=4096, max_prompt_tokens=200)


@pytest.fixture(scope="module")
def simple(api_base: Path) -> Iterator[Running]:
    with serving(open_tiny(api_base, LIMITS), LIMITS, ServeOptions(simple=True)) as running:
        yield running


def chat(running: Running, content: str, **changes: Any) -> Any:
    return running.post("/v1/chat/completions", chat_body(content, max_tokens=8, **changes)).json()


def test_both_answer_as_the_chat_does(simple: Running) -> None:
    text = "What is 2 + 3? 四 / five"
    whole = chat(simple, text)
    asked = {"temperature": 0, "max_tokens": 8}
    found = simple.post("/", {"text": text, **asked}).json()
    assert found["text"] == whole["choices"][0]["message"]["content"]
    assert found["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert found["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    with simple.client() as client:
        answer = client.get(f"/query/{quote(text, safe='')}")
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_an_instruction_has_its_input_as_in_training(simple: Running) -> None:
    asked = {"temperature": 0, "instruction": "Add them."}
    apart = simple.post("/", {**asked, "input": "2 and 3"}).json()["usage"]["prompt_tokens"]
    alone = simple.post("/", asked).json()["usage"]["prompt_tokens"]
    joined = simple.post("/", {"text": "Add them.\n2 and 3"}).json()["usage"]["prompt_tokens"]
    assert len({apart, alone, joined}) == 3, "the template writes an input in a place of its own"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"), ({"text": ""}, "text"), ({"text": "a", "instruction": "b"}, "text"), ({"text": 1}, "text"),
        ({"text": "a", "stream": True}, "stream"), ({"text": "a", "n": 2}, "n"), ({"text": "a", "min_p": 0.1}, "min_p"),
        ({"text": "a", "max_tokens": 99}, "max_tokens"), ({"text": "a", "temperature": 9.0}, "temperature"),
        ({"text": "a " * 700}, "text"), ({"instruction": "a " * 700}, "instruction"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_field(simple: Running, body: Any, param: str) -> None:
    answer = simple.post("/", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_no_such_model_method_or_question(simple: Running) -> None:
    assert simple.post("/", {"text": "a", "model": "other"}).status_code == 404
    assert simple.post("/", {"text": "a" * 5000}).status_code == 413
    with simple.client() as client:
        assert client.get("/").status_code == 405 and client.put("/").status_code == 405
        assert client.post("/query/a").status_code == 405
        assert client.get("/query/").status_code == 400


def curl(*words: str) -> tuple[int, Any]:
    """Status and body that the program curl got."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    start = ["curl", "--silent", "--show-error", "--noproxy", "*", "--write-out", "\n%{http_code}", *words]
    body, _, status = subprocess.run(start, capture_output=True, check=True, timeout=120).stdout.rpartition(b"\n")
    return int(status), json.loads(body)


def test_curl_asks_in_chinese_by_path_and_body(simple: Running) -> None:
    text = "你好 三条河？100% / a#b?c"
    n_tokens = chat(simple, text)["usage"]["prompt_tokens"]
    bodies = [["-d", json.dumps({"text": text}, ensure_ascii=escaped), "-H", "Content-Type: application/json"]
              for escaped in (False, True)]  # fmt: skip
    for words in ([f"{simple.url}/query/{quote(text, safe='')}"], *([f"{simple.url}/", *body] for body in bodies)):
        status, answer = curl(*words)
        assert (status, answer["usage"]["prompt_tokens"]) == (200, n_tokens), answer
    status, answer = curl(f"{simple.url}/query/你好")  # as it is typed: curl sends the bytes of the terminal
    assert (status, answer["usage"]["prompt_tokens"]) == (200, chat(simple, "你好")["usage"]["prompt_tokens"])


def test_curl_is_told_what_of_a_text_would_be_lost_and_what_is_too_long(simple: Running) -> None:
    cases = [
        (["/query/What is 2?and why".replace(" ", "%20")], 400, "%3F"),
        (["/query/" + quote("你好".encode("gbk"))], 400, "not UTF-8"),
        (["/query/" + "a%20" * 700], 400, "context length is 201 tokens"),
        (["/query/" + "a" * 90_000], 400, "context length is 201 tokens"),
        (["/", "-d", "text=hello"], 400, "Content-Type: application/json"),
        (["/", "-d", json.dumps({"text": "a" * 5000}), "-H", "Content-Type: application/json"], 413, "max_body_bytes"),
    ]
    for (path, *words), status, told in cases:
        found, answer = curl(simple.url + path, *words)
        assert (found, told in answer["error"]["message"]) == (status, True), (path[:40], answer)


def test_a_foreign_page_cannot_ask_by_an_image(simple: Running) -> None:
    with simple.client() as client:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            assert client.get("/query/a", headers={"sec-fetch-site": site}).status_code == status
        foreign = client.get("/query/a", headers={"origin": "https://evil.example", "sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403


def test_keys_and_rates_hold_and_the_log_keeps_no_question(
    api_base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits = LimitOptions(max_answer_tokens=8, rate_limit=2)
    log = tmp_path / "log.jsonl"
    options = ServeOptions(simple=True, api_key=KEY, request_log=str(log))
    with serving(open_tiny(api_base, limits), limits, options) as running:
        key = {"authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{running.url}/query/mine").status_code == 401
        statuses = [httpx.get(f"{running.url}/query/mysecret", headers=key, timeout=60).status_code]
        statuses.append(httpx.post(f"{running.url}/", json={"text": "mysecret"}, headers=key, timeout=60).status_code)
        statuses.append(httpx.get(f"{running.url}/%71uery/mysecret", headers=key).status_code)
        counted = httpx.get(f"{running.url}/metrics", headers=key).text
    assert statuses == [200, 200, 429]
    assert "mysecret" not in log.read_text(encoding="utf-8") + "".join(capsys.readouterr())
    assert 'path="/query/"' in counted and 'path="/"' in counted and "mysecret" not in counted


def test_without_the_flag_there_are_no_such_paths(api_base: Path) -> None:
    with serving(open_tiny(api_base, LIMITS), LIMITS) as running, running.client() as client:
        assert client.get("/query/a").status_code == 404 and client.post("/", json={"text": "a"}).status_code == 404
        assert "/query/{text}" not in running.app.openapi()["paths"]
