"""Clients of other people: OpenAI's own, sync and async, LangChain's, and Hugging Face's, which shares no code.

Requests of further clients were recorded and are sent again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.inference.engine import InferenceEngine, OutOfMemory
from tests.serve.api.serving import (
    LONG,
    Breaking,
    Running,
    chat_body,
    events_of,
    long_body,
    open_tiny,
    serving,
    wait_until,
)

KEY = "sesame"
CHAT = "/v1/chat/completions"
THINKS = (
    "{%- if depth is defined %}{{ 1 // depth }}{% endif -%}"
    "{%- for part in topic or [] %}{{ part.b or part }} {% endfor -%}"
    "{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor -%}"
    "{%- if add_generation_prompt %}assistant: "
    "{%- if enable_thinking is defined and enable_thinking is false %}[no]{% endif %}{% endif -%}"
)
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def locked(engine: InferenceEngine) -> Iterator[Running]:
    """A server that asks for a key."""
    with serving(engine, LimitOptions(), ServeOptions(api_key=KEY)) as running:
        yield running


def keyless(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(locked: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture
def expected(locked: Running) -> str:
    """What a plain request is answered."""
    headers = {"authorization": f"Bearer {KEY}"}
    body = chat_body(max_tokens=20) | {"messages": MESSAGES}
    return str(locked.post("/v1/chat/completions", body, headers=headers).json()["choices"][0]["message"]["content"])


def test_openai(client: openai.OpenAI, expected: str) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    text = client.completions.create(model="tiny", prompt="Hi", max_tokens=3, echo=True, logprobs=1)
    assert text.choices[0].text.startswith("Hi")
    assert text.choices[0].logprobs is not None
    vectors = client.embeddings.create(model="tiny", input=["a", "b"])  # asks for base64 by itself
    floats = client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in vectors.data] == [pytest.approx(one.embedding, abs=1e-6) for one in floats.data]
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "onecard"


def test_no_limit_is_the_servers_own(client: openai.OpenAI) -> None:
    """As llama.cpp's and LM Studio's clients ask for it; this server was started with 16."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1, temperature=0)
    text = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=-1, temperature=0, extra_body={"n_predict": -1}
    )
    assert answer.usage is not None and text.usage is not None
    assert answer.usage.completion_tokens == text.usage.completion_tokens == 16


def test_variables_of_a_template_are_rendered_as_transformers_does(api_base: Path, tmp_path: Path) -> None:
    jinja = tmp_path / "thinks.jinja"
    jinja.write_text(THINKS, encoding="utf-8")
    engine = open_tiny(api_base, LimitOptions(), str(jinja))
    with serving(engine, LimitOptions()) as server, keyless(server) as client:
        prompts, answers = [], []
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"topic": ["a", {"b": "你"}]}):
            own = {"chat_template": THINKS, "add_generation_prompt": True, "tokenize": False}
            prompts.append(engine.tokenizer().apply_chat_template(MESSAGES, **own, **variables))
            texts = client.completions.create(model="tiny", prompt=prompts[-1], max_tokens=9, temperature=0)
            answers.append(
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=9, temperature=0,
                    extra_body={"chat_template_kwargs": variables},
                )
            )  # fmt: skip
            assert texts.usage is not None and answers[-1].usage is not None
            assert texts.usage.prompt_tokens == answers[-1].usage.prompt_tokens
            assert texts.choices[0].text.strip() == (answers[-1].choices[0].message.content or "").strip()
        assert prompts[0] == prompts[1] and len(set(prompts)) == 3
        for wrong in ({"enable_thinkng": True}, {"eos_token": "x"}, {"depth": 0}, {"topic": 5}):
            with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, extra_body={"chat_template_kwargs": wrong}
                )


def test_openai_streaming(client: openai.OpenAI, expected: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"top_k": 5, "repetition_penalty": 1.0},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    stop = expected[10:13]  # this helper takes an answer that was cut for an error
    call: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0, "stop": stop}
    with client.chat.completions.stream(**call) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == (expected[: expected.index(stop)], "stop")
    texts = client.completions.create(model="tiny", prompt="Hi", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts)


def test_openai_async(locked: Running, expected: str) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as client:
            call: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**call), client.chat.completions.create(**call, stream=True)
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**call, tools=[{"type": "function"}])
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == (expected, expected)


@pytest.mark.parametrize(
    ("changes", "kind", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", None),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty", "unsupported_parameter"),
        ({"extra_body": {"beams": 3}}, openai.BadRequestError, "beams", "unknown_parameter"),
        ({"messages": [MESSAGES[1] | {"content": "x " * 20_000}]}, openai.BadRequestError, "messages",
         "context_length_exceeded"),
        ({"stream": True, "n": 99}, openai.BadRequestError, "n", None),
        ({"extra_headers": {"Origin": "http://evil.example"}}, openai.PermissionDeniedError, None,
         "origin_not_allowed"),
    ],
)  # fmt: skip
def test_openais_typed_errors(
    client: openai.OpenAI,
    changes: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
) -> None:
    call: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2} | changes
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**call)
    assert type(caught.value) is kind
    assert (caught.value.param, caught.value.code) == (param, code)


def test_openais_authentication_error(locked: Running) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="other", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_openais_rate_limit_error(api_base: Path) -> None:
    limits = LimitOptions(max_queue=0)
    with serving(open_tiny(api_base, limits), limits) as server, keyless(server) as client:
        with server.client() as other, other.stream("POST", CHAT, json=long_body(stream=True)) as first:
            lines = first.iter_lines()
            assert next(lines)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        wait_until(lambda: not server.app.jobs, 2)
        again = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
        assert again.choices[0].finish_reason


def test_openais_error_in_a_stream(engine: InferenceEngine) -> None:
    broken: Any = Breaking(engine, OutOfMemory("lower --max_new_tokens"), 2)
    with serving(broken, LimitOptions()) as server, keyless(server) as client:
        call: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": LONG, "extra_body": {"min_tokens": LONG}}
        stream = client.chat.completions.create(**call, stream=True)
        with pytest.raises(openai.APIError, match="max_new_tokens"):
            list(stream)


def test_langchain(locked: Running, expected: str) -> None:
    """It sends parameters, roles and parts of its own choice."""
    common: Any = {"base_url": f"{locked.url}/v1", "api_key": KEY, "model": "tiny", "max_retries": 0}
    chat = ChatOpenAI(**common, temperature=0, max_tokens=20)
    conversation = [("system", "Be brief."), ("human", "你好")]
    answer = chat.invoke(conversation)
    assert answer.content == expected
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 20
    assert "".join(str(piece.content) for piece in chat.stream(conversation)) == expected
    assert asyncio.run(chat.ainvoke(conversation)).content == expected
    assert [one.content for one in chat.batch([conversation] * 3)] == [expected] * 3
    # A conversation with an earlier answer goes back as the client keeps it.
    assert chat.invoke([*conversation, answer, ("human", "再说一遍")]).content
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat.bind_tools([{"name": "f", "description": "d", "parameters": {}}]).invoke(conversation)
    assert OpenAI(**common, temperature=0, max_tokens=5).invoke("Hi")
    vectors = OpenAIEmbeddings(**common, check_embedding_ctx_length=False).embed_documents(["a", "b"])
    assert len(vectors) == 2


NAMED = [SystemMessage("Be brief."), HumanMessage("你好", name="Ann"), AIMessage("Yes", name="Bob"),
         HumanMessage("And?", name="Ann")]  # fmt: skip


def test_langchain_with_named_messages(locked: Running) -> None:
    chat = ChatOpenAI(base_url=f"{locked.url}/v1", api_key=KEY, model="tiny", temperature=0, max_tokens=8)  # type: ignore[arg-type]
    plain = [type(message)(message.content) for message in NAMED]
    assert chat.invoke(NAMED).content == chat.invoke(plain).content
    assert "".join(str(piece.content) for piece in chat.stream(NAMED)) == chat.invoke(plain).content


def test_langchain_with_fields_for_the_service(locked: Running) -> None:
    fields = {"metadata": {"a": "b"}, "store": True, "service_tier": "flex", "user": "u", "safety_identifier": "s"}
    chat = ChatOpenAI(base_url=f"{locked.url}/v1", api_key=KEY, model="tiny", max_tokens=8, model_kwargs=fields)  # type: ignore[arg-type]
    assert chat.bind(prompt_cache_key="k").invoke("你好").content


# As these clients sent them to this server, word for word but for the texts.
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "autogen-ext 0.7.5, create": (CHAT, {
        "messages": [{"content": "Be brief.", "role": "system"}, {"role": "user", "name": "Ann", "content": "Hi"},
                     {"role": "assistant", "content": "Yes"}, {"role": "user", "name": "Cleo_1", "content": "And?"}],
        "model": "tiny", "max_tokens": 8, "stream": False}),
    "autogen-ext 0.7.5, create_stream": (CHAT, {
        "messages": [{"role": "user", "name": "Ann", "content": "Hi"}], "model": "tiny", "max_tokens": 8,
        "stream": True}),
    "autogen-agentchat 0.7.5, RoundRobinGroupChat": (CHAT, {
        "messages": [{"content": "Be a critic.", "role": "system"},
                     {"role": "user", "name": "user", "content": "Write a line."},
                     {"role": "user", "name": "writer", "content": "A line."}],
        "model": "tiny", "max_tokens": 8, "stream": False}),
    "langchain-openai 1.7.4": (CHAT, {
        "messages": [{"content": "Be brief.", "role": "system"}, {"content": "Hi", "name": "Ann", "role": "user"},
                     {"content": "Yes", "name": "Bob", "role": "assistant"},
                     {"content": "And?", "name": "Ann", "role": "user"}],
        "model": "tiny", "max_completion_tokens": 8, "stream": False}),
    "llama-index-embeddings-openai-like 0.4.0": ("/v1/embeddings", {
        "input": [f"text {k}" for k in range(20)], "model": "tiny", "encoding_format": "base64"}),
    "llama-index-llms-openai-like 0.8.1": (CHAT, {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "model": "tiny",
        "max_tokens": 8, "stream": False, "temperature": 0.1}),
    "llama-index-llms-openai-like 0.8.1, complete": ("/v1/completions", {
        "model": "tiny", "prompt": "Hi", "max_tokens": 8, "stream": False, "temperature": 0.1}),
    "litellm 1.110.2": (CHAT, {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}}],
        "max_tokens": 8}),
    "litellm 1.110.2, embedding": ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
}  # fmt: skip


@pytest.mark.parametrize("client", RECORDED)
def test_recorded_requests_are_answered(server: Running, client: str) -> None:
    path, body = RECORDED[client]
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    if path == "/v1/embeddings":
        assert len(answer.json()["data"]) == len(body["input"])
    elif body.get("stream"):
        assert events_of(answer.text)[-1] == "[DONE]"
    else:
        # Without a seed it is sampled: eight tokens, or fewer where the end was drawn.
        (choice,), n_tokens = answer.json()["choices"], answer.json()["usage"]["completion_tokens"]
        assert n_tokens == 8 if choice["finish_reason"] == "length" else 0 < n_tokens <= 8


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_knows_a_prompt_that_is_too_long(client: openai.OpenAI, stream: bool) -> None:
    """What `ExceptionCheckers` of litellm 1.110.2 looks for in the client's error; aider 0.86.2 goes by its class."""
    for call in (
        lambda: client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 9000}], stream=stream
        ),
        lambda: client.completions.create(model="tiny", prompt=[5] * 8429, stream=stream),
        lambda: client.embeddings.create(model="tiny", input="word " * 9000),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        text = str(caught.value).lower()
        assert "this model's maximum context length is" in text
        assert not re.search(r"rate[\s_\-]*limit", text)
        assert not any(word in text for word in ("string_above_max_length", "invalid 'user'"))


def test_hugging_faces_client(locked: Running, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it means other machines; this is our own
    client = InferenceClient(base_url=locked.url, api_key=KEY)
    answer = client.chat_completion(MESSAGES, model="tiny", max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == expected
    pieces = client.chat_completion(MESSAGES, model="tiny", max_tokens=20, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(base_url=locked.url, api_key="other").chat_completion(MESSAGES, model="tiny")
