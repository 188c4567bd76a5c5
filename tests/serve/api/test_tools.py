"""Tools: what the model is shown of them, and its calls as clients read them. The answers are written by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from transformers import AutoTokenizer

from onecard.config.inference import LimitOptions
from onecard.data.messages import Turn
from onecard.data.tool_answers import CALL_MARKS
from onecard.inference.call import GenerateCall, PromptRow
from onecard.inference.detokenize import decode, hidden_ids
from onecard.inference.engine import GenerationRequest, InferenceEngine
from tests.data.tool_template_logics import TOOL_TEMPLATES
from tests.serve.api.serving import Running, chat_body, client_of, say, scripted, serving
from tests.serve.api.test_errors import CHAT, shaped

TEMPLATES = {"qwen-2.5": "hermes", "llama-3.1": "llama", "mistral": "mistral"}
CALLS = {
    "hermes": 'Looking.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama": '{"name": "add", "parameters": {"x": 1}}; {"name": "now", "parameters": {}}',
    "mistral": 'Looking.[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}}, {"name": "now", "arguments": {}}]',
}
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Adds 1.", "parameters": PARAMETERS},
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "What is 1 + 1?"}
CALLED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}]}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"}


@pytest.fixture(scope="module", params=TEMPLATES)
def asked(request: pytest.FixtureRequest, api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server and the form of its template's calls."""
    jinja = tmp_path_factory.mktemp("templates") / f"{request.param}.jinja"
    jinja.write_text(TOOL_TEMPLATES[request.param], encoding="utf-8")
    engine: Any = scripted(api_base, jinja)
    with serving(engine, LimitOptions()) as server:
        yield server, TEMPLATES[request.param]


@pytest.fixture(scope="module")
def hermes(api_base: Path) -> Iterator[Running]:
    engine: Any = scripted(api_base, "chatml")
    with serving(engine, LimitOptions()) as server:
        yield server


def named(calls: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in calls]


def test_openai_reads_the_calls_whole_and_streamed(asked: tuple[Running, str]) -> None:
    server, style = asked
    say(server, CALLS[style])
    body: Any = {"model": "tiny", "messages": [USER], "tools": [ADD, NOW]}
    content = None if style == "llama" else "Looking."
    with client_of(server) as client:
        whole = client.chat.completions.create(**body).choices[0]
        with client.chat.completions.stream(**body) as stream:
            joined = stream.get_final_completion().choices[0]
        chunks = list(client.chat.completions.create(**body, stream=True))
        assert client.chat.completions.create(**body, parallel_tool_calls=False).choices[0].message.tool_calls[1:] == []
    for choice in (whole, joined):
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or None) == content
        assert named(choice.message.tool_calls) == [("add", '{"x": 1}'), ("now", "{}")]
        assert len({call.id for call in choice.message.tool_calls or ()}) == 2
    assert [call.index for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()] == [0, 1]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_the_model_is_shown_what_transformers_shows(asked: tuple[Running, str]) -> None:
    server, _ = asked
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, USER, CALLED, RESULT, USER]
    engine = say(server, "2")
    answer = server.post(CHAT, {"model": "tiny", "messages": messages, "tools": [ADD, NOW]})
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    tokenizer = engine.tokenizer()
    plain: Any = [messages[0] | {"role": "system"}, *messages[1:]]
    plain[2] = CALLED | {"content": "", "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]}  # fmt: skip
    text = tokenizer.apply_chat_template(
        plain, tools=[ADD, NOW], chat_template=engine.template().jinja, add_generation_prompt=True, tokenize=False
    )
    shown, own = engine._rows(request)[0].ids, tokenizer(text, add_special_tokens=False)["input_ids"]
    # The tiny tokenizer begins every text with BOS, which not all of these templates write.
    shown, own = ([token_id for token_id in ids if token_id != tokenizer.bos_token_id] for ids in (shown, own))
    assert tokenizer.decode(shown) == tokenizer.decode(own)


def test_an_answer_that_is_cut_or_calls_nothing(hermes: Running) -> None:
    text = 'Looking.\n<tool_call>\n{"name": "add", "argum'
    say(hermes, text, "length")
    cut = hermes.chat(tools=[ADD]).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"] == {"role": "assistant", "content": text, "refusal": None}
    with client_of(hermes) as client:
        body: Any = {"model": "tiny", "messages": [USER], "tools": [ADD], "stream": True}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body)) == text
    say(hermes, "Two.\n")
    plain = hermes.chat(tools=[ADD]).json()["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == ("Two.\n", "stop")


def test_without_tools_nothing_is_read_out_of_an_answer(hermes: Running) -> None:
    engine = say(hermes, CALLS["hermes"])
    quiet: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}]
    for changes in quiet:
        choice = hermes.chat(**changes).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS["hermes"], "stop")
    assert [turn.role for request in engine.requests for turn in request.turns] == ["user"] * 3
    assert [request.kept_tokens for request in engine.requests] == [()] * 3


def test_langchain_with_tools(hermes: Running) -> None:
    say(hermes, CALLS["hermes"])
    chat = ChatOpenAI(base_url=f"{hermes.url}/v1", api_key="none", model="tiny", max_retries=0)  # type: ignore[arg-type]
    bound = chat.bind_tools([ADD, NOW])
    answer = bound.invoke("What is 1 + 1?")
    assert isinstance(answer, AIMessage)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", {"x": 1}), ("now", {})]
    joined: Any = None
    for piece in bound.stream("What is 1 + 1?"):
        joined = piece if joined is None else joined + piece
    assert [(call["name"], call["args"]) for call in joined.tool_calls] == [("add", {"x": 1}), ("now", {})]
    engine = say(hermes, "It is 2.")
    results = [ToolMessage("2", tool_call_id=str(call["id"])) for call in answer.tool_calls]
    assert bound.invoke([HumanMessage("What is 1 + 1?"), answer, *results]).content == "It is 2."
    turns = engine.requests[0].turns
    assert [turn.role for turn in turns] == ["tool_list", "user", "assistant", "tool", "tool"]
    assert [turn.call_id for turn in turns[3:]] == [call.id for call in turns[2].tool_calls]


def call_of(**changes: Any) -> dict[str, Any]:
    call: Any = CALLED["tool_calls"][0]
    return CALLED | {"tool_calls": [call | {"function": call["function"] | changes}]}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"), ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": ADD["function"] | {"strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [ADD | {"function": {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}}],
          "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [ADD], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [ADD["function"]]}, "functions"),
        ({"messages": [USER, CALLED | {"role": "user", "content": "x"}]}, "messages[1].tool_calls"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [USER, call_of(arguments="{"), RESULT]}, "messages[1].tool_calls"),
        ({"messages": [USER, call_of(arguments="[1]"), RESULT]}, "messages[1].tool_calls"),
        ({"messages": [USER, call_of(name=""), RESULT]}, "messages[1].tool_calls[0].function.name"),
        ({"messages": [USER, CALLED, RESULT | {"content": None}]}, "messages[2].content"),
        ({"messages": [USER, CALLED]}, "messages"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(hermes: Running, changes: dict[str, Any], param: str) -> None:
    say(hermes, "no")
    assert shaped(hermes.post(CHAT, chat_body() | changes), 400)["param"] == param


def test_a_template_without_a_known_form_is_refused(server: Running) -> None:
    error = shaped(server.chat(tools=[ADD]), 400)
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "chatml" in error["message"]


def test_marks_that_are_control_tokens_stay_in_the_text(api_base: Path, engine: InferenceEngine) -> None:
    """As [TOOL_CALLS] is one of Mistral's, which decoding leaves out otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(api_base)
    assert hidden_ids(tokenizer, CALL_MARKS) is None
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|other|>"]})
    ids = tokenizer('One[TOOL_CALLS]f{"x": "你"}<|other|>', add_special_tokens=False)["input_ids"]
    hidden = hidden_ids(tokenizer, CALL_MARKS)
    assert decode(ids, tokenizer) == 'Onef{"x": "你"}'
    assert decode(ids, tokenizer, hidden) == 'One[TOOL_CALLS]f{"x": "你"}'
    (row,) = engine._rows(GenerationRequest(turns=(Turn("user", "Hi"),), kept_tokens=(tokenizer.eos_token,)))
    assert row.hidden == hidden_ids(engine.tokenizer(), [tokenizer.eos_token])
    bundle = replace(engine._adapters.use(""), tokenizer=tokenizer)
    for kept, text in ((None, 'Onef{"x": "你"}'), (hidden, 'One[TOOL_CALLS]f{"x": "你"}')):
        call = GenerateCall(bundle, [PromptRow([1, 5], 99, hidden=kept)], GenerationRequest().sampling)
        (answer,) = call.answers([[*ids, tokenizer.eos_token_id]])
        assert (answer.text, answer.reason) == (text, "stop")
