"""Tools, and the calls of them, in the forms that data sets keep: OpenAI's, LLaMA-Factory's, Hermes' (in the text).

Knows the JSON and the marks of these forms. Does not know shapes of records, the order of turns, or templates.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from onecard.data.json_records import NumberText
from onecard.data.messages import ToolCall
from onecard.data.values import UnusableRecord, kind_of, quoted, safe

# Where a record keeps its tools; "functions" is OpenAI's earlier name.
TOOL_FIELDS = ("tools", "functions")
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_LIST = re.compile(r"<tools>\s*(\[.*?\]|\{.*?\})\s*</tools>", re.DOTALL)
# The system text of Hermes' data sets: how tools are listed and called, which a template says in its own words.
_HERMES_SYSTEM = re.compile(r"\s*You are a function calling AI model.*<tools>.*</tools>.*</tool_call>\s*", re.DOTALL)


def tool_list(value: Any, where: str) -> str:
    """The tools in a field of a record as JSON text, each as {"type": "function", "function": ...}; "" for none.

    '[{"name": "add", "parameters": {}}]' -> '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    Raises UnusableRecord.
    """
    if value is None or value != value or value in ("", [], {}):
        return ""
    tools = _parsed(value, where) if isinstance(value, str) else plain(value)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, (list, tuple)):
        raise UnusableRecord(f"{where} is {kind_of(tools)}, a list of tools is expected")
    found = []
    for number, tool in enumerate(tools, start=1):
        tool = _parsed(tool, f"{where}, tool {number},") if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRecord(f'{where}, tool {number}, is not {{"name", "description", "parameters"}}')
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return json.dumps(found, ensure_ascii=False) if found else ""


def calls_of(value: Any, where: str) -> tuple[ToolCall, ...]:
    """The calls in `tool_calls`, in `function_call`, or in the JSON text of a function_call turn.

    [{"id": "a", "type": "function", "function": {"name": "add", "arguments": "{\\"x\\": 1}"}}]
        -> (ToolCall("add", '{"x": 1}', "a"),)
    Raises UnusableRecord.
    """
    value = _parsed(value, where) if isinstance(value, str) else value
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_call(item, f"{where}, call {n}," if len(items) > 1 else where) for n, item in enumerate(items, 1))


def calls_in_text(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """An answer without the calls that stand in it between <tool_call> and </tool_call>, and these calls.

    "One moment.\\n<tool_call>\\n{\\"name\\": \\"now\\"}\\n</tool_call>" -> "One moment.", (ToolCall("now"),)
    What is no call stays in the text.
    """
    try:
        calls = tuple(call for found in _CALL.findall(text) for call in calls_of(found, ""))
    except UnusableRecord:
        return text, ()
    return (_CALL.sub("", text).strip(), calls) if calls else (text, ())


def results_in_text(text: str) -> list[str]:
    """The results of tools in one turn, without the <tool_response> around each; a text without marks is one."""
    results = _RESULT.findall(text)
    return results if results and not _RESULT.sub("", text).strip() else [text]


def tools_in_system(text: str) -> str | None:
    """The JSON text of the tools that a system text of Hermes' wording lists; None for any other text."""
    listed = _LIST.search(text) if _HERMES_SYSTEM.fullmatch(text) else None
    try:
        return tool_list(listed[1], "the system text") if listed else None
    except UnusableRecord:
        return None


def lists_tools(text: str) -> bool:
    """Whether a system text lists tools by itself."""
    return "<tools>" in text and "</tools>" in text


def plain(value: Any) -> Any:
    """A value with its numbers as numbers: records keep them as they were written."""
    if isinstance(value, NumberText):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: plain(content) for key, content in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _call(item: Any, where: str) -> ToolCall:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise UnusableRecord(f'{where} is no tool call: {{"name", "arguments"}} is expected')
    arguments = function.get("arguments", function.get("parameters"))
    place = f"{where} the arguments of {quoted(function['name'])},"
    found = _parsed(arguments, place) if isinstance(arguments, str) and arguments.strip() else plain(arguments or {})
    if not isinstance(found, dict):
        raise UnusableRecord(f"{place} are {kind_of(found)}, an object is expected")
    call_id = item.get("id")
    return ToolCall(function["name"], json.dumps(found, ensure_ascii=False), str(call_id) if call_id else "")


def _parsed(text: str, where: str) -> Any:
    """JSON text, or Python's way of writing the same, which some data sets have."""
    try:
        return json.loads(text)
    except ValueError as reason:
        problem = reason
    try:
        found = ast.literal_eval(text.strip())
        json.dumps(found)
        return found
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UnusableRecord(f"{where} is no JSON ({problem}): {safe(text, 40)}") from None
