"""Thoughts apart from answers, and how much the model is to think. The answers are written by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from onecard.config.inference import LimitOptions
from tests.data.tool_template_logics import TOOL_TEMPLATES
from tests.serve.api.serving import Running, chat_body, client_of, say, scripted, serving
from tests.serve.api.test_errors import CHAT, shaped
from tests.serve.api.test_tools import ADD, CALLS, USER, named

THOUGHT = "<think>\nOne and one.\n</think>\n\nTwo."
EFFORT = "{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'effort ' ~ reasoning_effort }}</think>"
SWITCH = TOOL_TEMPLATES["qwen-3"].replace("enable_thinking is false", "thinking is false")
OPENS = TOOL_TEMPLATES["qwen-3"].replace("enable_thinking is false else ''", "enable_thinking is false else '<think>'")
JINJA = {name: TOOL_TEMPLATES[name] for name in ("qwen-3", "qwen-3-thinking")} | {"effort": EFFORT, "switch": SWITCH}


@pytest.fixture(scope="module")
def servers(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """A server for each of these templates."""
    folder, running = tmp_path_factory.mktemp("templates"), {}
    with ExitStack() as stack:
        for name, jinja in JINJA.items():
            (folder / f"{name}.jinja").write_text(jinja, encoding="utf-8")
            engine: Any = scripted(api_base, folder / f"{name}.jinja")
            running[name] = stack.enter_context(serving(engine, LimitOptions()))
        yield running


def prompt_of(server: Running, **changes: Any) -> str:
    """What the model is shown."""
    engine = say(server, "Two.")
    answer = server.chat(**changes)
    assert answer.status_code == 200, answer.text
    return str(engine.tokenizer().decode(engine._rows(engine.requests[0])[0].ids))


@pytest.mark.parametrize(("name", "text"), [("qwen-3", THOUGHT), ("qwen-3-thinking", THOUGHT.removeprefix("<think>"))])
def test_a_thought_comes_apart_whole_and_streamed(servers: dict[str, Running], name: str, text: str) -> None:
    server = servers[name]
    say(server, text)
    body: Any = {"model": "tiny", "messages": [USER]}
    with client_of(server) as client:
        whole: Any = client.chat.completions.create(**body).choices[0].message
        pieces: list[Any] = [piece.choices[0].delta for piece in client.chat.completions.create(**body, stream=True)]
        kept = client.chat.completions.create(**body, extra_body={"reasoning_format": "none"}).choices[0].message
    assert (whole.reasoning_content, whole.content) == ("One and one.", "Two.")
    assert "".join(getattr(piece, "reasoning_content", None) or "" for piece in pieces) == "One and one."
    assert "".join(piece.content or "" for piece in pieces) == "Two."
    assert kept.content == text


def test_a_thought_before_calls_and_one_that_is_cut(servers: dict[str, Running]) -> None:
    server = servers["qwen-3"]
    say(server, f"<think>Hm.</think>{CALLS['hermes']}")
    with client_of(server) as client:
        body: Any = {"model": "tiny", "messages": [USER], "tools": [ADD]}
        with client.chat.completions.stream(**body) as stream:
            joined: Any = stream.get_final_completion()
        for answer in (client.chat.completions.create(**body), joined):
            found: Any = answer.choices[0].message
            assert (found.reasoning_content, found.content) == ("Hm.", "Looking.")
            assert [name for name, _ in named(found.tool_calls)] == ["add", "now"]
    say(server, "<think>\nOne and", "length")
    message = server.chat().json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("One and", "")
    say(server, "Two.")
    assert "reasoning_content" not in server.chat().json()["choices"][0]["message"]


def test_what_follows_a_prompt_that_opens_no_thought_is_no_thought(servers: dict[str, Running]) -> None:
    say(servers["qwen-3"], "Two.</think>")
    message = servers["qwen-3"].chat().json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Two.</think>", "refusal": None}


def test_efforts_and_switches(servers: dict[str, Running]) -> None:
    qwen = servers["qwen-3"]
    plain = prompt_of(qwen)
    for changes in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
    ):
        for server in (qwen, servers["switch"]):
            shown = prompt_of(server, **changes)
            assert shown.startswith(plain)
            assert "</think>" in shown[len(plain) :]
    assert prompt_of(qwen, chat_template_kwargs={"enable_thinking": True}) == plain
    assert "effort low" in prompt_of(servers["effort"], reasoning_effort="low")
    assert "effort none" in prompt_of(servers["effort"], reasoning_effort="none")


@pytest.mark.parametrize(
    ("name", "changes", "param"),
    [
        ("qwen-3", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("qwen-3-thinking", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("qwen-3", {"reasoning_effort": "much"}, "reasoning_effort"),
        ("qwen-3", {"reasoning_format": "raw"}, "reasoning_format"),
        ("qwen-3", {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "reasoning_effort"),
        ("qwen-3", {"messages": [USER | {"reasoning_content": "Hm."}]}, "messages[0].reasoning_content"),
    ],
)
def test_what_the_template_cannot_do_is_named(
    servers: dict[str, Running], name: str, changes: dict[str, Any], param: str
) -> None:
    say(servers[name], "no")
    assert shaped(servers[name].post(CHAT, chat_body() | changes), 400)["param"] == param


def test_thoughts_of_earlier_answers_go_to_the_template(servers: dict[str, Running]) -> None:
    """Qwen3 shows those behind the last question, such as before a call whose result follows."""
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "a", "content": "2"}
    for field in ("reasoning_content", "reasoning"):
        messages = [USER, {"role": "assistant", field: "Adding it.", "tool_calls": [call]}, result]
        assert "Adding it." in prompt_of(servers["qwen-3"], messages=messages)


def test_going_on_inside_a_thought_and_behind_it(servers: dict[str, Running]) -> None:
    say(servers["qwen-3"], " more.</think>Two.")
    begun = {"role": "assistant", "content": "<think>One and one, no"}
    message = (
        servers["qwen-3"].chat(messages=[USER, begun], continue_final_message=True).json()["choices"][0]["message"]
    )
    assert (message["reasoning_content"], message["content"]) == ("more.", "Two.")
    say(servers["qwen-3-thinking"], " more.")
    begun = {"role": "assistant", "content": "<think>Hm.</think>Two, no"}
    answer = servers["qwen-3-thinking"].chat(messages=[USER, begun], continue_final_message=True).json()
    assert answer["choices"][0]["message"]["content"] == " more."


@pytest.mark.parametrize(("thinking", "thought"), [("auto", "Two."), ("off", None)])
def test_the_servers_own_switch_counts(api_base: Path, tmp_path: Path, thinking: str, thought: str | None) -> None:
    """--thinking off closes the thought that this template opens otherwise."""
    (tmp_path / "opens.jinja").write_text(OPENS, encoding="utf-8")
    engine: Any = scripted(api_base, tmp_path / "opens.jinja", thinking=thinking)
    with serving(engine, LimitOptions()) as server:
        say(server, "Two.")
        message = server.chat().json()["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, "" if thought else "Two.")
