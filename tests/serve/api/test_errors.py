"""What is refused, with which status and in which words: always OpenAI's shape, always the field that is to blame."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import Running, chat_body, serving

USER = {"role": "user", "content": "Hi"}


def shaped(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, after its status and shape were checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) > 10
    assert error["type"] == {429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return error


CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [USER], "max_tokens": 1},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 1},
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 1},
}


@pytest.mark.parametrize("path", BODIES)
def test_unknown_names(server: Running, path: str) -> None:
    body = BODIES[path]
    for name in ("modle", "trust_remote_code", "lora_path", "adapter", "tokenizer", "prompt_type", "load_in_4bit"):
        error = shaped(server.post(path, body | {name: True}), 400)
        assert (error["param"], error["code"]) == (name, "unknown_parameter")
    assert "did you mean model?" in shaped(server.post(path, body | {"modle": "x"}), 400)["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": "1"},
        "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"), ({"n": 9}, "n"), ({"n": 1.5}, "n"), ({"n": True}, "n"), ({"n": "2"}, "n"), ({"n": 10**30},
        "n"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -2}, "max_tokens"), ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": -1.0}, "max_tokens"), ({"max_completion_tokens": -2}, "max_completion_tokens"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_completion_tokens": 9}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"min_tokens": 9}, "min_tokens"), ({"min_tokens": -1}, "min_tokens"), ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"), ({"seed": "1"}, "seed"), ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"), ({"stop": ["a", 5]}, "stop"), ({"stop": ["a"] * 17}, "stop"), ({"stop": "a" * 1001},
        "stop"),
        ({"stop": {"a": 1}}, "stop"), ({"top_k": -2}, "top_k"), ({"num_beams": 0}, "num_beams"), ({"num_beams": 9},
        "num_beams"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"), ({"stream": 1}, "stream"), ({"stream": "true"},
        "stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"stream_options": 5}, "stream_options"),
        ({"logprobs": 1}, "logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "num_beams": 2}, "num_beams"), ({"user": 5}, "user"),
        ({"model": 5}, "model"), ({"model": None}, "model"), ({"messages": []}, "messages"), ({"messages": None},
        "messages"),
        ({"messages": "Hi"}, "messages"), ({"messages": ["Hi"]}, "messages[0]"), ({"messages": [{}]},
        "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER, USER | {"role": "critic"}]}, "messages[1].role"),
        ({"messages": [USER | {"role": 5}]}, "messages[0].role"),
        ({"messages": [USER | {"content": None}]}, "messages[0].content"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content"),
        ({"messages": [USER | {"content": []}]}, "messages[0].content"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [USER | {"name": 5}]}, "messages[0].name"),
        ({"messages": [USER | {"content": [{"type": "text", "text": "a", "cache_control": 5}]}]},
        "messages[0].content[0].cache_control"),
        ({"metadata": 5}, "metadata"), ({"store": "yes"}, "store"), ({"prompt_cache_key": 5}, "prompt_cache_key"),
        ({"messages": [USER | {"content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content[0].x"),
        ({"messages": [USER | {"content": ["a"]}]}, "messages[0].content[0].type"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]},
        "messages[1].tool_calls[0].id"),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER, {"role": "assistant"}], "continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}], "continue_final_message": True,
          "add_generation_prompt": True}, "add_generation_prompt"),
        ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"), ({"logit_bias": [[5, 1]]}, "logit_bias"),
        ({"logit_bias": {"448": 1}}, "logit_bias"), ({"logit_bias": "5"}, "logit_bias"),
        ({"messages": [{"role": "system", "content": "Yes"}]}, "messages"),
    ],
)  # fmt: skip
def test_wrong_values_in_a_chat(server: Running, changes: dict[str, Any], param: str) -> None:
    error = shaped(server.post("/v1/chat/completions", chat_body() | changes), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": 5},
        "prompt"),
        ({"prompt": ["a", 5]}, "prompt"), ({"prompt": [5, -1]}, "prompt"), ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"), ({"prompt": [10**9]}, "prompt"), ({"prompt": [[5], []]}, "prompt"),
        ({"prompt": ["a"] * 9}, "prompt"), ({"prompt": ["a"] * 3, "n": 3}, "prompt"), ({"prompt": [448]}, "prompt"),
        ({"logprobs": -1}, "logprobs"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"), ({"max_tokens": -2}, "max_tokens"), ({"max_completion_tokens": 5},
        "max_completion_tokens"),
        ({"messages": [USER]}, "messages"),
    ],
)  # fmt: skip
def test_wrong_values_in_a_completion(server: Running, changes: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
    assert shaped(server.post("/v1/completions", body | changes), 400)["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": [[]]}, "input"),
        ({"input": ["a"] * 2049}, "input"), ({"input": [[5]] * 2049}, "input"), ({"input": ["a", [5]]}, "input"),
        ({"input": [448]}, "input"), ({"encoding_format": "int8"}, "encoding_format"), ({"input": {"a": 1}}, "input"),
    ],
)  # fmt: skip
def test_wrong_values_in_an_embedding(server: Running, changes: dict[str, Any], param: str) -> None:
    assert shaped(server.post("/v1/embeddings", {"model": "tiny", "input": "Hi"} | changes), 400)["param"] == param


# As OpenAI says it; LiteLLM looks for "this model's maximum context length is" in lower case, others for the numbers.
OPENAIS_WORDS = re.compile(
    r"This model's maximum context length is (\d+) tokens\. However, your (\w+) resulted in (\d+) tokens\. "
    r"Please reduce the length of the (\w+)\."
)


def test_prompts_that_are_too_long(server: Running) -> None:
    text = "The quick brown fox " * 3000
    for path, body, field in (
        ("/v1/chat/completions", {"messages": [USER | {"content": text}]}, "messages"),
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/completions", {"prompt": text, "echo": True, "max_tokens": 0}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 9000, "echo": True, "logprobs": 0, "max_tokens": 0}, "prompt"),
        ("/v1/embeddings", {"input": text}, "input"),
        ("/v1/chat/completions", {"messages": [USER | {"content": text}], "stream": True}, "messages"),
    ):
        error = shaped(server.post(path, {"model": "tiny"} | body), 400)
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        told = OPENAIS_WORDS.fullmatch(error["message"])
        assert told and (int(told[1]), told[2], told[4]) == (8192, field, field)
        assert int(told[3]) >= 8192


@pytest.mark.parametrize("path", BODIES)
def test_unknown_models(server: Running, path: str) -> None:
    body = BODIES[path]
    for name in ("gpt-4", "", "tinny", "../tiny", "/etc/passwd"):
        error = shaped(server.post(path, body | {"model": name}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b'"text"', b"[]", b"null", b"5", b'{"model": NaN}', b'{"temperature": Infinity}',
     b'{"model": "\\ud800"}', b'{"\\udc00": 1}', b"\xff\xfe\xfa",
     b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 5000 + b"}",
     b'{"model": "tiny"', b"{'model': 'tiny'}"],
    ids=lambda raw: ascii(raw[:20]),
)  # fmt: skip
def test_bodies_that_are_no_json_object(server: Running, raw: bytes) -> None:
    with server.client() as client:
        headers = {"content-type": "application/json"}
        error = shaped(client.post("/v1/chat/completions", content=raw, headers=headers), 400)
        assert error["code"] == "invalid_json"


def test_bodies_of_another_type(server: Running) -> None:
    """A page may send text/plain to any server without asking it first."""
    raw = json.dumps(chat_body()).encode()
    with server.client() as client:
        for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            assert shaped(client.post("/v1/chat/completions", content=raw, headers=kind), 400)["code"] == "invalid_json"


def test_bodies_that_are_too_large(engine: InferenceEngine) -> None:
    limits = LimitOptions(max_body_bytes=5000)
    big = chat_body("x" * 5000)

    def pieces() -> Any:
        yield json.dumps(big).encode()

    with serving(engine, limits) as server, server.client() as client:
        assert shaped(client.post("/v1/chat/completions", json=big), 413)["code"] == "body_too_large"
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=pieces(), headers=headers)  # chunked: no length announced
        assert shaped(answer, 413)["code"] == "body_too_large"
        assert server.chat("x" * 100).status_code == 200


def test_the_key(engine: InferenceEngine) -> None:
    with serving(engine, LimitOptions(), ServeOptions(api_key="sesame")) as server, server.client() as client:
        paths = ["/", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
                 "/openapi.json", "/nothing", "/health/", "/docs"]  # fmt: skip
        for path in paths:
            for method in ("GET", "POST", "OPTIONS"):  # as a program asks; a browser's own question names its page
                answer = client.request(method, path)
                assert shaped(answer, 401)["code"] == "invalid_api_key"
                assert "www-authenticate" in answer.headers
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
        assert client.get("/v1/models", auth=("anyone", "sesame")).status_code == 200
        assert shaped(client.get("/v1/models", auth=("anyone", "other")), 401)
        document = client.get("/openapi.json", headers={"authorization": "Bearer sesame"}).json()
        assert document["security"] == [{"key": []}]


def test_pages_on_the_same_port_stand_behind_the_same_guards(engine: InferenceEngine) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/broken":
            raise ValueError("SECRET")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"the page"})

    with serving(engine, LimitOptions(), ServeOptions(api_key="sesame")) as server, server.client() as client:
        server.app.mount("/", page)
        assert client.get("/").status_code == 401
        key = ("me", "sesame")
        assert client.get("/", auth=key).text == client.get("/any/path", auth=key).text == "the page"
        assert shaped(client.get("/", auth=key, headers={"host": "evil.example"}), 403)
        assert shaped(client.post("/", auth=key, headers={"origin": "http://evil.example"}), 403)
        # The API stays itself.
        assert shaped(client.get("/v1/nothing", auth=key), 404)["code"] == "not_found"
        assert shaped(client.post("/health"), 405)
        assert client.get("/v1/models", auth=key).json()["data"]
        assert "SECRET" not in shaped(client.get("/broken", auth=key), 500)["message"]


def test_foreign_hosts_and_origins(server: Running) -> None:
    with server.client() as client:
        assert shaped(client.get("/health", headers={"host": "evil.example"}), 403)["code"] == "host_not_allowed"
        headers = {"origin": "http://evil.example"}
        refused = client.post("/v1/chat/completions", json=chat_body(), headers=headers)
        assert shaped(refused, 403)["code"] == "origin_not_allowed"
        own = client.post("/v1/chat/completions", json=chat_body(), headers={"origin": server.url})
        assert own.status_code == 200
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 400 " in connection.recv(1000)


def test_limits_of_this_server(engine: InferenceEngine, api_base: Any) -> None:
    """Those that the server itself keeps; the engine's own are its tests' matter."""
    with serving(engine, LimitOptions(max_choices=2, max_embedding_inputs=2)) as server:
        body = {"model": "tiny", "max_tokens": 1}
        assert shaped(server.post("/v1/completions", body | {"prompt": ["a", "b", "c"]}), 400)["param"] == "prompt"
        assert server.post("/v1/completions", body | {"prompt": ["a", "b"]}).status_code == 200
        assert (
            shaped(server.post("/v1/embeddings", {"model": "tiny", "input": ["a", "b", "c"]}), 400)["param"] == "input"
        )
