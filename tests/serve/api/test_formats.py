"""Answers held to a schema, an expression or a grammar, and tools that must be called. The model's words are random."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import pytest
from pydantic import BaseModel, Field

from onecard.config.inference import LimitOptions
from tests.data.tool_template_logics import TOOL_TEMPLATES
from tests.serve.api.serving import Running, client_of, events_of, open_tiny, say, scripted, serving
from tests.serve.api.test_errors import shaped
from tests.serve.api.test_tools import NOW, TEMPLATES

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
X = {"type": "object", "properties": {"x": {"enum": [0, 1]}}, "required": ["x"], "additionalProperties": False}
BIT: dict[str, Any] = {"type": "function", "function": {"name": "bit", "parameters": X}}
USER: Any = {"role": "user", "content": "Who?"}


def named(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


FORMS: dict[str, tuple[dict[str, Any], str]] = {  # what a request says, and the expression that its answers match
    "guided_regex": ({"guided_regex": r"[a-f]{2}/\d"}, "[a-f]{2}/[0-9]"),
    "structured_outputs.regex": ({"structured_outputs": {"regex": "x[0-3]"}}, "x[0-3]"),
    "guided_choice": ({"guided_choice": ["yes", "no\n你"]}, "yes|no\n你"),
    "structured_outputs.choice": ({"structured_outputs": {"choice": ["a", "b"]}}, "[ab]"),
    "guided_grammar": ({"guided_grammar": 'start: "a" /[0-9]/ "b"?'}, "a[0-9]b?"),
    "structured_outputs.grammar": ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
    "grammar": ({"grammar": 'root ::= "(" [a-c] ")"'}, r"\([a-c]\)"),
}
BOOLEAN = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
SCHEMA_FORMS: dict[str, dict[str, Any]] = {
    "response_format": {"response_format": named(BOOLEAN, strict=True)},
    "response_format, llama.cpp": {"response_format": {"type": "json_object", "schema": BOOLEAN}},
    "guided_json": {"guided_json": BOOLEAN},
    "guided_json, a text": {"guided_json": json.dumps(BOOLEAN)},
    "structured_outputs": {"structured_outputs": {"json": BOOLEAN, "disable_fallback": True}},
    "json_schema": {"json_schema": BOOLEAN},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_chats_and_completions(server: Running, form: str) -> None:
    fields, expression = FORMS[form]
    chat = server.chat(**fields, max_tokens=20).json()["choices"][0]
    body = {"model": "tiny", "prompt": "Hi", "temperature": 1, "seed": 3, "max_tokens": 20}
    text = server.post("/v1/completions", body | fields).json()["choices"][0]
    for answer, reason in ((chat["message"]["content"], chat["finish_reason"]), (text["text"], text["finish_reason"])):
        assert re.fullmatch(expression, answer)
        assert reason == "stop"


@pytest.mark.parametrize("form", SCHEMA_FORMS)
def test_every_form_of_a_schema(server: Running, form: str) -> None:
    choice = server.chat(**SCHEMA_FORMS[form], max_tokens=40).json()["choices"][0]
    assert jsonschema_rs.is_valid(BOOLEAN, json.loads(choice["message"]["content"]))


def test_any_object(server: Running) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        choice = server.chat(**fields, stop=['"'], max_tokens=30).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize("changes", [{"temperature": 1.5, "n": 3, "seed": 1}, {"num_beams": 3},
                                     {"num_beams": 2, "temperature": 1.0, "seed": 2}, {"repetition_penalty": 2.0},
                                     {"no_repeat_ngram_size": 1}, {"min_tokens": 40},
                                     {"temperature": 1.0, "top_k": 2, "seed": 4}])  # fmt: skip
def test_with_every_way_of_choosing(server: Running, changes: dict[str, Any]) -> None:
    body: dict[str, Any] = {"guided_regex": r'\{"a": (true|false), "b": [0-9]{3}\}', "max_tokens": 40} | changes
    choices = server.chat(**body).json()["choices"]
    assert len(choices) == changes.get("n", 1)
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]).keys() == {"a", "b"}


def test_ends_early(server: Running) -> None:
    """At a stop text, and at the most tokens, which the finish_reason says."""
    body = {"guided_regex": "(ab){9}", "max_tokens": 5}
    cut = server.chat(**body).json()["choices"][0]
    assert ("(ab){9}", cut["finish_reason"], cut["message"]["content"]) == (body["guided_regex"], "length", "ababa")
    stopped = server.chat(**body, stop="ba").json()["choices"][0]
    assert (stopped["finish_reason"], stopped["message"]["content"]) == ("stop", "a")


def test_streamed(server: Running) -> None:
    body = {"response_format": named(SCHEMA), "max_tokens": 120, "temperature": 1.0, "seed": 8}
    whole = server.chat(**body).json()["choices"][0]["message"]["content"]
    events = events_of(server.chat(**body, stream=True).text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == whole
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(whole))


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=4)


class Owner(BaseModel):
    """As pydantic writes it: with $defs, titles, and null for what is not there."""

    pets: list[Pet] = Field(min_length=1, max_length=2)
    is_in: bool | None


def test_openais_client_parses_into_a_model(server: Running) -> None:
    with client_of(server) as client:
        messages: Any = [USER]
        answer = client.chat.completions.parse(
            model="tiny", messages=messages, response_format=Owner, temperature=1.5, seed=1, max_tokens=400
        )
        with client.chat.completions.stream(
            model="tiny", messages=messages, response_format=Owner, temperature=1.5, seed=1, max_tokens=400
        ) as stream:
            joined = stream.get_final_completion().choices[0].message.parsed
    owner = answer.choices[0].message.parsed
    assert isinstance(owner, Owner)
    assert owner == joined


DEEP = {"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": "json"}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    ({"response_format": named([])}, "response_format.json_schema.schema", "object"),
    ({"response_format": named(DEEP)}, "response_format.json_schema.schema",
     'at properties.a.items: cannot be held to the keywords ["not"]'),
    ({"response_format": named({"$ref": "http://x.org/y"})}, "response_format.json_schema.schema", "http://x.org/y"),
    ({"guided_json": {"type": "strng"}}, "guided_json", "strng"),
    ({"guided_json": "{"}, "guided_json", "JSON"),
    ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}, "guided_json", "minimum"),
    ({"guided_json": {"$defs": {"x": {"pattern": "(a", "type": "string"}}, "$ref": "#/$defs/x"}},
     "guided_json", "at $defs.x: regex parse error: error: unclosed group"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": ""}, "guided_regex", "text"),
    ({"guided_choice": []}, "guided_choice", "list"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
    ({"grammar": "root ::= foo"}, "grammar", "foo"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "both"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "both"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "longer"),
    ({"guided_json": {"enum": ["x" * 90] * 3000}}, "guided_json", "longer"),
    ({"guided_json": reduce(lambda items, _: {"items": items}, range(400), {})}, "guided_json", "recursion"),
    ({"guided_json": reduce(lambda items, _: {"items": items}, range(900), {})}, "guided_json", "recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[f"{k}: {bad[1]}" for k, bad in enumerate(BAD)])
def test_what_cannot_be_held_is_named(server: Running, fields: dict[str, Any], param: str, words: str) -> None:
    error = shaped(server.chat(**fields), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.fixture(scope="module", params=TEMPLATES)
def calling(request: pytest.FixtureRequest, api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    jinja = tmp_path_factory.mktemp("calling") / f"{request.param}.jinja"
    jinja.write_text(TOOL_TEMPLATES[request.param], encoding="utf-8")
    with serving(open_tiny(api_base, LimitOptions(), str(jinja)), LimitOptions()) as server:
        yield server


def test_a_tool_must_be_called(calling: Running) -> None:
    body: dict[str, Any] = {"tools": [BIT, NOW], "max_tokens": 200, "temperature": 1.0, "parallel_tool_calls": False}
    seen = set()
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "bit"}}]
    for choice in choices:
        answer = calling.chat(**body, tool_choice=choice, seed=2).json()["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
        seen.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        assert arguments == {} if call["function"]["name"] == "now" else arguments["x"] in (0, 1)
    assert "bit" in seen
    streamed = events_of(calling.chat(**body, tool_choice="required", seed=2, stream=True).text)
    assert [event["choices"][0]["finish_reason"] for event in streamed[:-1]][-1] == "tool_calls"


def test_strict_tools_hold_calls_and_leave_the_rest(calling: Running) -> None:
    strict = {"type": "function", "function": BIT["function"] | {"strict": True}}
    assert calling.chat(tools=[strict], max_tokens=8).json()["choices"][0]["finish_reason"] == "length"
    only = calling.chat(tools=[strict], response_format=named({"const": 5}), max_tokens=200, temperature=1.0, seed=1)
    choice = only.json()["choices"][0]
    said = choice["message"]["content"]
    assert said == "5" or json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["x"] in (0, 1)


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_a_thought_may_come_first(api_base: Path, tmp_path: Path, opening: str) -> None:
    """tests/inference/test_grammar.py holds answers to it; here whether the prompt has opened it."""
    jinja = tmp_path / "thinks.jinja"
    jinja.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}" + opening, encoding="utf-8")
    engine: Any = scripted(api_base, jinja)
    with serving(engine, LimitOptions()) as server:
        say(server, "Hm.</think>yes" if opening else "<think>Hm.</think>yes")
        message = server.chat(guided_choice=["yes"]).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("yes", "Hm.")
    grammar = engine.requests[0].grammar
    assert (grammar.thought, grammar.closing, grammar.is_open) == ("<think>", "</think>", bool(opening))
