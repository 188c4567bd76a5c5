"""POST /v1/responses: the same answers as chat's, in the newer form, whole and as named events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from onecard.config.inference import LimitOptions
from onecard.inference.engine import OutOfMemory
from tests.serve.api.serving import Breaking, Running, client_of, say, scripted, serving
from tests.serve.api.test_errors import shaped

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
PART = {"type": "input_text", "text": "Hi"}


class Answer(BaseModel):
    ok: Literal["yes", "no"]


@pytest.fixture(scope="module")
def thinking(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    jinja = tmp_path_factory.mktemp("responses") / "thinks.jinja"
    jinja.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<think>", encoding="utf-8")
    engine: Any = scripted(api_base, jinja)
    with serving(engine, LimitOptions()) as server:
        yield server


def test_openai_whole_and_streamed(server: Running) -> None:
    chat = server.chat("Hi", max_tokens=12).json()
    text = chat["choices"][0]["message"]["content"]
    with client_of(server) as client:
        whole = client.responses.create(**BODY, input="Hi")
        # This helper takes an answer that was cut for an error.
        with client.responses.stream(
            **BODY, input=[{"role": "user", "content": "Hi"}], extra_body={"stop": text[5:8]}
        ) as stream:
            final = stream.get_final_response()
        pieces = list(client.responses.create(**BODY, input="Hi", stream=True))
    assert (whole.output_text, final.output_text, final.status) == (text, text[:5], "completed")
    assert (whole.status, whole.incomplete_details.reason if whole.incomplete_details else "") == (
        "incomplete", "max_output_tokens"
    )  # fmt: skip
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]
    )  # fmt: skip
    assert [event.sequence_number for event in pieces] == list(range(len(pieces)))
    names = [event.type for event in pieces if event.type != "response.output_text.delta"]
    assert names == [f"response.{name}" for name in (
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", "incomplete")]  # fmt: skip
    assert "".join(event.delta for event in pieces if event.type == "response.output_text.delta") == text


def test_instructions_and_earlier_answers_are_messages(server: Running) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And?"}]  # fmt: skip
    chat = server.post("/v1/chat/completions", {"model": "tiny", "temperature": 0, "max_tokens": 12,
                                                "messages": messages}).json()  # fmt: skip
    items: list[Any] = [
        {"type": "message", "role": "user", "content": [PART]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    own = server.post(PATH, BODY | {"input": items, "instructions": "Be brief."}).json()
    assert own["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert own["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_thoughts_are_items_of_their_own(thinking: Running) -> None:
    engine = say(thinking, "Hm.</think>Yes.")
    with client_of(thinking) as client:
        whole = client.responses.create(**BODY, input="Hi")
        with client.responses.stream(**BODY, input="Hi") as stream:
            joined = stream.until_done().get_final_response()
        back: Any = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in whole.output],
                     {"role": "user", "content": "And?"}]  # fmt: skip
        client.responses.create(**BODY, input=back)
    for response in (whole, joined):
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert (response.output_text, response.status) == ("Yes.", "completed")
        assert response.output[0].content[0].text == "Hm."  # type: ignore[union-attr, index]
    assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 0
    assert [(turn.role, turn.content, turn.thought) for turn in engine.requests[-1].turns][1] == (
        "assistant", "Yes.", "Hm."
    )  # fmt: skip


def test_openais_client_parses_a_response(server: Running) -> None:
    with client_of(server) as client:
        parsed = client.responses.parse(
            model="tiny", input="Hi", text_format=Answer, temperature=1.5, extra_body={"seed": 1}, max_output_tokens=99
        )
    assert parsed.output_parsed is not None and parsed.output_parsed.ok in ("yes", "no")
    assert parsed.status == "completed"


def test_langchain_by_responses(server: Running) -> None:
    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=12, use_responses_api=True,
        max_retries=0,
    )  # type: ignore[arg-type]  # fmt: skip
    answer = chat.invoke("Hi")
    assert answer.text == server.chat("Hi", max_tokens=12).json()["choices"][0]["message"]["content"]
    assert "".join(piece.text for piece in chat.stream("Hi")) == answer.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"), ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"), ({"input": "x " * 9000}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strng"}}}},
         "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort"), ({"reasoning": {"summary": "auto"}},
         "reasoning.summary"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"), ({"n": 2}, "n"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server: Running, changes: dict[str, Any], param: str) -> None:
    assert shaped(server.post(PATH, BODY | {"input": "Hi"} | changes), 400)["param"] == param


def test_an_error_in_a_stream(server: Running) -> None:
    broken: Any = Breaking(server.engine, OutOfMemory("lower --max_new_tokens"), 2)
    with serving(broken, LimitOptions()) as other:
        lines = other.post(PATH, BODY | {"input": "Hi", "stream": True, "max_output_tokens": 400}).text.splitlines()
        assert json.loads(lines[lines.index("event: error") + 1].removeprefix("data: "))["code"] == "out_of_memory"
        with client_of(other) as client:
            *_, last = client.responses.create(
                model="tiny", input="Hi", max_output_tokens=400, temperature=0, stream=True
            )
        assert last.type == "error" and "max_new_tokens" in last.message
