"""Calls in answers: which form a template writes, what is read back of it, and that nothing shown is taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.data.jinja_chat import render_chat
from onecard.data.message_forms import call_form
from onecard.data.messages import ToolCall, Turn
from onecard.data.tool_answers import CallStyle, call_style, read_calls
from tests.data.tool_template_logics import TOOL_TEMPLATES

BUILT_IN = Path(__file__).parents[2] / "onecard" / "data" / "templates"
STYLES: dict[str, CallStyle | None] = {
    "qwen-2.5": "hermes", "qwen-3": "hermes", "qwen-3-thinking": "hermes", "hermes": "hermes", "llama-3.1": "llama",
    "mistral": "mistral", "deepseek-r1": None, "gpt-oss": None,
}  # fmt: skip
NOW, ADD = ToolCall("now"), ToolCall("add", '{"x": 1, "y": [2]}')
HERMES_NOW = '<tool_call>\n{"name": "now"}\n</tool_call>'
HERMES_ADD = '<tool_call>{"name": "add", "arguments": {"x": 1, "y": [2]}}</tool_call>'
MARKED = '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>'
LLAMA_ADD = '{"name": "add", "parameters": {"x": 1, "y": [2]}}'
ADDS = '[{"name": "add", "arguments": {"x": 1, "y": [2]}}, {"name": "now", "arguments": {}, "id": "abcdefghi"}]'
ANSWERS: list[tuple[CallStyle, str, str, list[ToolCall]]] = [
    ("hermes", "Hello.\n", "Hello.\n", []),
    ("hermes", HERMES_NOW, "", [NOW]),
    ("hermes", f"One moment.\n{HERMES_NOW}\n{HERMES_ADD}", "One moment.", [NOW, ADD]),
    ("hermes", f"{HERMES_NOW}\nDone: 1 < 2", "\nDone: 1 < 2", [NOW]),
    ("hermes", HERMES_NOW.removesuffix("\n</tool_call>"), "", [NOW]),
    ("hermes", MARKED, "", [ToolCall("f", '{"x": "</tool_call>"}')]),
    ("hermes", HERMES_NOW[:20], HERMES_NOW[:20], []),
    ("hermes", f"<tool_call>now()</tool_call> {HERMES_ADD}", "<tool_call>now()</tool_call>", [ADD]),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("mistral", f"[TOOL_CALLS] {ADDS}", "", [ADD, ToolCall("now", "{}", "abcdefghi")]),
    ("mistral", 'Wait.[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"x": 1, "y": [2]}', "Wait.",
     [NOW, ToolCall("add", ADD.arguments, "abcdefghi")]),
    ("mistral", 'now{"x": 1}', 'now{"x": 1}', []),
    ("mistral", "[TOOL_CALLS] what?", "[TOOL_CALLS] what?", []),
    ("llama", LLAMA_ADD, "", [ADD]),
    ("llama", f"<|python_tag|>{LLAMA_ADD}; {LLAMA_ADD}\n", "", [ADD, ADD]),
    ("llama", f"Sure: {LLAMA_ADD}", f"Sure: {LLAMA_ADD}", []),
    ("llama", '{"name": "Ann"}', '{"name": "Ann"}', []),
    ("llama", f"{LLAMA_ADD} and more", f"{LLAMA_ADD} and more", []),
]  # fmt: skip


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_the_form_of_a_template(name: str) -> None:
    assert call_style(TOOL_TEMPLATES[name]) == STYLES[name]


def test_the_form_of_a_built_in_template() -> None:
    found = {path.stem: call_style(path.read_text(encoding="utf-8")) for path in BUILT_IN.glob("*.jinja")}
    assert {name for name, style in found.items() if style} == {"chatml"}
    assert found["chatml"] == "hermes"


def test_xml_calls_and_templates_that_list_no_tools_are_of_no_known_form() -> None:
    qwen = TOOL_TEMPLATES["qwen-2.5"]
    no_list = qwen.replace("{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}", "")
    as_xml = qwen.replace('{"name": "\' + call.name + \'", "arguments": ', "<function=' + call.name + '>").replace(
        "+ '}\\n</tool_call>'", "+ '</function>\\n</tool_call>'"
    )
    assert len({qwen, no_list, as_xml}) == 3
    assert call_style(no_list) is None
    assert call_style(as_xml) is None


@pytest.mark.parametrize(("style", "text", "content", "calls"), ANSWERS)
def test_what_is_read(style: CallStyle, text: str, content: str, calls: list[ToolCall]) -> None:
    assert read_calls(text, style, ended=True) == (content, calls)
    for end in range(len(text) + 1):
        said, made = read_calls(text[:end], style, ended=False)
        assert content.startswith(said)
        assert made == calls[: len(made)]


def test_texts_come_as_they_are_written_and_calls_when_they_are_whole() -> None:
    text = f"One < two.\n{HERMES_NOW}\n"
    assert read_calls("One < two", "hermes", ended=False) == ("One < two", [])
    assert read_calls("One <", "hermes", ended=False) == ("One", [])
    assert read_calls(text, "hermes", ended=False) == ("One < two.", [NOW])
    assert read_calls(f"[TOOL_CALLS] {ADDS}", "mistral", ended=False)[1][0] == ADD
    assert read_calls("Four", "llama", ended=False) == ("Four", [])


def test_no_more_calls_than_are_wanted() -> None:
    text = f"Wait.\n{HERMES_NOW}\n{HERMES_ADD}\nDone."
    assert read_calls(text, "hermes", ended=True, most=1) == ("Wait.", [NOW])
    assert read_calls(f"[TOOL_CALLS]{ADDS}", "mistral", ended=True, most=1) == ("", [ADD])
    assert read_calls("No call.", "hermes", ended=True, most=1) == ("No call.", [])


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style])
def test_what_a_template_writes_is_read_back(name: str) -> None:
    arguments = {"text": 'He said "}</tool_call>" \\ 你好\n', "n": [1, {"a": None}], "x": -1.5}
    call = ToolCall("send_mail", json.dumps(arguments, ensure_ascii=False))
    messages = call_form(TOOL_TEMPLATES[name]).messages((Turn("user", "Hi"), Turn("assistant", "", tool_calls=(call,))))
    text = render_chat(TOOL_TEMPLATES[name], messages, {"bos_token": "", "eos_token": "</s>"}, False)
    start = text.index({"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama": '{"name"'}[str(STYLES[name])])
    text = text[start:].partition("</s>")[0].partition("<|eot_id|>")[0].partition("<|im_end|>")[0]
    ((read,), style) = read_calls(text, STYLES[name] or "hermes", ended=True)[1], STYLES[name]
    assert (read.name, json.loads(read.arguments)) == ("send_mail", arguments), style
