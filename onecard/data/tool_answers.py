"""The calls in a model's answer, in the form that its chat template writes: Hermes' and Qwen's, Llama 3's, Mistral's.

The form is found out by rendering a call and reading it back. A text that grows gives a content and calls that grow:
what may still become a call is held back.

Knows the marks of these forms. Does not know tokenizers, requests or streams.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from onecard.data.jinja_chat import render_chat
from onecard.data.message_forms import call_form
from onecard.data.messages import ToolCall, Turn
from onecard.data.tool_calls import calls_of
from onecard.data.values import UnusableRecord
from onecard.errors import DataError

CallStyle = Literal["hermes", "llama", "mistral"]
STYLES: tuple[CallStyle, ...] = ("hermes", "mistral", "llama")
# Marks that some tokenizers hold as control tokens, which are no part of a text otherwise.
CALL_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")

_OPENING = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
_CLOSING = re.compile(r"\s*</tool_call>")
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?\s*(?=\{)")  # Mistral since 2025: f[ARGS]{"x": 1}
_PYTHON_TAG = "<|python_tag|>"
_BLANK, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s;]*")
_JSON = json.JSONDecoder()
_PROBE = ToolCall("onecard_probe", '{"x": 1}')
_TOOL = {"type": "function", "function": {"name": "onecard_tool", "description": "d", "parameters": {}}}
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")


@lru_cache(maxsize=32)
def call_style(jinja: str) -> CallStyle | None:
    """The form in which this template writes calls; None where it is another, or where it lists no tools."""
    turns = (Turn("user", "question"), Turn("assistant", "", tool_calls=(_PROBE,)))
    messages = call_form(jinja).messages(turns)
    try:
        prompt = render_chat(jinja, messages[:1], _TOKENS, True, tools=[_TOOL])
        text = render_chat(jinja, messages, _TOKENS, False, tools=[_TOOL])
    except DataError:
        return None
    # Not all of the prompt need stand in the text: it may open a thought.
    n_same = next((k for k, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(prompt))
    written = text[n_same:]
    if "onecard_tool" not in prompt:
        return None
    return next((style for style in STYLES if _is_probe(written, style)), None)


def read_calls(text: str, style: CallStyle, *, ended: bool, most: int | None = None) -> tuple[str, list[ToolCall]]:
    """What is said in an answer, and its calls; what is no whole call is said. `ended`: nothing more will come.

    hermes, "One moment.\\n<tool_call>\\n{\\"name\\": \\"now\\"}\\n</tool_call>" -> "One moment.", [ToolCall("now")]
    hermes, "One moment.\\n<tool_c", not ended -> "One moment.", []

    most: calls after so many, and what is said after them, are left out.
    """
    said: list[str] = []
    calls: list[ToolCall] = []
    for piece in _pieces(text, style, ended):
        if isinstance(piece, str):
            said.append(piece)
        else:
            calls += piece
        if most is not None and len(calls) >= most:
            calls = calls[:most]
            break
    content = "".join(said)
    return (content if ended and not calls else content.rstrip()), calls


def _is_probe(written: str, style: CallStyle) -> bool:
    calls = read_calls(written[: written.rfind("}") + 1] if style == "llama" else written, style, ended=True)[1]
    return [(call.name, call.arguments) for call in calls] == [(_PROBE.name, _PROBE.arguments)]


def _pieces(text: str, style: CallStyle, ended: bool) -> Iterator[str | list[ToolCall]]:
    """Texts and calls in turn, as far as more text cannot change them."""
    if style == "llama":
        calls = _llama(text) if ended else []
        if calls or ended or not _may_be_calls(text):
            yield calls or text
        return
    mark, at = _OPENING[style], 0
    while (start := text.find(mark, at)) >= 0:
        yield text[at:start]
        at = start + len(mark)
        read = _hermes if style == "hermes" else _mistral
        try:
            calls, after = read(text, at)
        except (ValueError, RecursionError, UnusableRecord):
            if not ended:
                return  # it may yet become a call
            yield mark
            continue
        closed = _CLOSING.match(text, after) if style == "hermes" else None
        if style == "hermes" and not (closed or ended):
            return
        yield calls
        at = closed.end() if closed else after
    rest = text[at:]
    n_open = next((n for n in range(len(mark) - 1, 0, -1) if rest.endswith(mark[:n])), 0)
    yield rest if ended else rest[: len(rest) - n_open]


def _hermes(text: str, at: int) -> tuple[list[ToolCall], int]:
    """The calls at this place, and the place behind them. Raises ValueError or UnusableRecord."""
    value, after = _JSON.raw_decode(text, _skipped(_BLANK, text, at))
    return list(calls_of(value, "")), after


def _mistral(text: str, at: int) -> tuple[list[ToolCall], int]:
    """[{"name": "f", "arguments": {}}], or f[ARGS]{}."""
    named = _NAMED.match(text, at)
    if named is None:
        return _hermes(text, at)
    arguments, after = _JSON.raw_decode(text, named.end())
    return list(calls_of({"name": named[1], "arguments": arguments, "id": named[2]}, "")), after


def _llama(text: str) -> list[ToolCall]:
    """The calls of an answer that is nothing but calls, one after another; none for any other."""
    text, at = text.strip().removeprefix(_PYTHON_TAG), 0
    calls: list[ToolCall] = []
    try:
        while (at := _skipped(_BETWEEN, text, at)) < len(text):
            value, at = _JSON.raw_decode(text, at)
            if not isinstance(value, dict) or not {"parameters", "arguments"} & value.keys():
                return []
            calls += calls_of(value, "")
    except (ValueError, RecursionError, UnusableRecord):
        return []
    return calls


def _may_be_calls(text: str) -> bool:
    start = text.strip()
    return start.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(start)


def _skipped(what: re.Pattern[str], text: str, at: int) -> int:
    found = what.match(text, at)
    return found.end() if found else at
