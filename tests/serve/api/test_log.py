"""One line per request: when, who, what, status, reason, duration, tokens; no text of a client's own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import chat_body, events_of, serving

CHAT = "/v1/chat/completions"
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d 127\.0\.0\.1 (\S+ \S+) (\d{3}|left)(?: (\D\S*))? \d+ ms"
    r"(?: (\d+\+\d+) tokens)?"
)


def test_refusals_of_every_layer_are_printed_with_their_reason(
    engine: InferenceEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    key = {"authorization": "Bearer sesame"}
    secret = "a-secret\x1b[31m"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "401 invalid_api_key"),
        ({"headers": key | {"host": "evil.example"}}, "403 host_not_allowed"),
        ({"headers": key | {"origin": "http://evil.example"}}, "403 origin_not_allowed"),
        ({"headers": key | {"content-encoding": "br"}}, "415 unsupported_content_encoding"),
        ({"headers": key | {"content-encoding": "gzip"}}, "400 invalid_gzip"),
        ({"headers": key, "content": b"x" * 1001}, "413 body_too_large"),
        ({"headers": key, "content": b"x"}, "400 invalid_json"),
        ({"headers": key, "json": chat_body() | {"temperature": secret}}, "400 invalid_value:temperature"),
        ({"headers": key, "json": chat_body() | {secret: 1}}, "400 unknown_parameter"),
        ({"headers": key, "json": chat_body(messages=[{"role": "user", "content": [{"type": secret}]}])},
         "400 unsupported_parameter:messages[0].content[0].type"),
        ({"headers": key, "json": chat_body(max_tokens=9000)}, "400 invalid_value:max_tokens"),
        ({"headers": key, "json": chat_body("x " * 300)}, "400 context_length_exceeded:messages"),
    ]  # fmt: skip
    limits = LimitOptions(max_body_bytes=1000, max_prompt_tokens=100)
    small = open_limited(engine, limits)
    with serving(small, limits, ServeOptions(api_key="sesame")) as server, server.client() as client:
        for given, _ in cases:
            client.post(CHAT, **given)
    printed = capfd.readouterr()
    lines = [LINE.fullmatch(line) for line in printed.out.splitlines()]
    assert [line and f"{line[2]} {line[3]}" for line in lines] == [reason for _, reason in cases]
    assert "secret" not in printed.out + printed.err
    assert "\x1b" not in printed.out + printed.err


def open_limited(engine: InferenceEngine, limits: LimitOptions) -> InferenceEngine:
    """The same model behind other limits."""
    return InferenceEngine(engine._adapters, limits)


def test_what_is_printed(engine: InferenceEngine, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "my secret question"
    with serving(engine, LimitOptions()) as server:
        answers = [server.chat(secret), server.chat(secret, stream=True), server.chat(secret, tools=[secret])]
        server.chat(secret, model=secret)
        server.post("/v1/completions", {"model": "tiny", "prompt": [secret, 5]})
        with server.client() as client:
            client.get("/v1/%0aevil%20line?secret=my-secret")
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    printed = capfd.readouterr()
    n_prompt = answers[0].json()["usage"]["prompt_tokens"]
    lines = [LINE.fullmatch(line) for line in printed.out.splitlines()]
    assert [line and line.groups() for line in lines] == [
        (f"POST {CHAT}", "200", "length", f"{n_prompt}+8"),
        (f"POST {CHAT}", "200", "length", f"{n_prompt}+8"),
        (f"POST {CHAT}", "400", "invalid_value:tools[0]", None),
        (f"POST {CHAT}", "404", "model_not_found:model", None),
        ("POST /v1/completions", "400", "invalid_value:prompt", None),
        ("GET /v1/%0aevil%20line", "404", "not_found", None),
    ]
    assert "secret" not in printed.out + printed.err

    with serving(engine, LimitOptions(), ServeOptions(log_prompts=True)) as server:
        body = server.chat("猫 is what?").json()
        for prompt in ("Raw", [5, 6]):
            assert (
                server.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2}).status_code == 200
            )
        events_of(server.chat("streamed", stream=True).text)
    printed = capfd.readouterr()
    assert "猫 is what?" in printed.out
    assert json.dumps(body["choices"][0]["message"]["content"], ensure_ascii=False) in printed.out
    assert '"Raw"' in printed.out
    assert "[5, 6]" in printed.out
    assert "streamed" in printed.out
