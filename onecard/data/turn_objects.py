"""One object of a list of turns: {"role", "content"}, {"from", "value"}, or both turns of an exchange.

Knows the keys and roles that other programs use. Does not know shapes of records or the order of turns.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from onecard.data.columns import THOUGHT, pair_of
from onecard.data.content_parts import joined_parts
from onecard.data.learn_marks import MARKS, learning_weight
from onecard.data.messages import Role, Turn
from onecard.data.thoughts import with_thought
from onecard.data.tool_calls import calls_in_text, calls_of, plain, results_in_text
from onecard.data.values import UnusableRecord, kind_of, optional_text, quoted, text_of

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # their content is the JSON of calls
_CALL_KEYS = ("tool_calls", "function_call")
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # of DeepSeek and Qwen, gpt-oss, OpenRouter
_READ = frozenset(("role", "content", "from", "value", *_CALL_KEYS, THOUGHT)) | MARKS

FIRST_OF_SEVERAL = "an answer is a list of several: the first one is learned"
ONLY_OF_LIST = "an answer is a list of one text: that one is learned"


def turns_in(item: Any, where: str, notes: list[str]) -> list[Turn]:
    """The turns in one object: one, or both of {"human": ..., "assistant": ...}. Raises UnusableRecord."""
    keys = pair_of(item)
    if keys is None or keys[1] is None:
        turns = _turns(item, where, notes)
    else:
        question, answer = (f'{where}, "{key}",' for key in keys)
        turns = [question_turn(item[keys[0]], question, notes), _answer(item, item[keys[1]], answer, notes)]
    return add_thought(turns, item, notes)


def add_thought(turns: list[Turn], item: dict[str, Any], notes: list[str]) -> list[Turn]:
    """The turns with the thought that --columns names, if there is one, in front of the last answer."""
    thought = optional_text(item.get(THOUGHT), "the thought", notes).strip()
    if not thought or not turns or turns[-1].role != "assistant":
        return turns
    return [*turns[:-1], replace(turns[-1], content=with_thought(thought, turns[-1].content))]


def answer_turn(value: Any, where: str, notes: list[str]) -> Turn:
    """The answer in one value, of several the first. Raises UnusableRecord for an empty one."""
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], dict):
            value = joined_parts(value, where, notes)
        else:
            notes.append(FIRST_OF_SEVERAL if len(value) > 1 else ONLY_OF_LIST)
            value = value[0]
    text = text_of(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: there is no answer to learn")
    return Turn("assistant", text)


def question_turn(value: Any, where: str, notes: list[str]) -> Turn:
    """The question in one value. Raises UnusableRecord for an empty one."""
    text = text_of(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: nothing was asked")
    return Turn("user", text)


def with_calls_of_text(turn: Turn) -> Turn:
    """An answer whose text holds calls between <tool_call> and </tool_call>, with these as calls."""
    if turn.role != "assistant" or turn.tool_calls:
        return turn
    text, calls = calls_in_text(turn.content)
    return replace(turn, content=text, tool_calls=calls)


def role_of(item: Any) -> Role | None:
    """The role of an object of a list of turns, or None."""
    name = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def unused_keys(turns: list[Any], name: str) -> list[str]:
    """Keys inside the turns that nothing reads, as they are named in the report: messages[].mood."""
    return [
        f"{name}[].{key}"
        for turn in turns
        if not _READ.issuperset(turn)
        for key, content in turn.items()
        if key not in _READ and content is not None and not _is_read(turn, key, content)
    ]


def _is_read(turn: dict[str, Any], key: str, content: Any) -> bool:
    if key in _THOUGHT_KEYS:
        return isinstance(content, str) and role_of(turn) == "assistant"
    if key in ("name", "tool_call_id"):
        return role_of(turn) == "tool"
    return key in (pair_of(turn) or ())


def _turns(item: Any, where: str, notes: list[str]) -> list[Turn]:
    if not isinstance(item, dict):
        raise UnusableRecord(f'{where} is {kind_of(item)}, {{"role", "content"}} or {{"from", "value"}} is expected')
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    has_calls = any(item.get(key) for key in _CALL_KEYS)
    if role_key not in item or (text_key not in item and not has_calls):
        seen = ", ".join(quoted(str(key)) for key in list(item)[:6]) or "nothing"
        raise UnusableRecord(f'{where} has {seen}; "role" and "content", or "from" and "value" are expected')
    name, role, content = item[role_key], role_of(item), item.get(text_key)
    if role is None:
        shown = quoted(name) if type(name) is str else kind_of(name)
        raise UnusableRecord(f"{where} has the {role_key} {shown}; known: {', '.join(ROLES)}")
    if has_calls and role != "assistant":
        raise UnusableRecord(f"{where} calls tools, which only an answer can")
    if role == "tool":
        return _results(item, content, where, notes)
    if isinstance(content, (list, tuple)):
        content = joined_parts(content, where, notes)
    if role == "assistant":
        if isinstance(name, str) and name.strip().lower() in _CALL_ROLES and not has_calls:
            return [_called(item, content, where, notes)]
        return [_answer(item, content, where, notes)]
    if role == "user":
        return [question_turn(content, where, notes)]
    return [Turn("system", optional_text(content, where, notes))]


def _results(item: dict[str, Any], content: Any, where: str, notes: list[str]) -> list[Turn]:
    """What tools gave; an object is its JSON text."""
    if isinstance(content, (list, tuple)) and content and all(isinstance(p, dict) and "type" in p for p in content):
        content = joined_parts(content, where, notes)
    if isinstance(content, (dict, list, tuple)):
        content = json.dumps(plain(content), ensure_ascii=False)
    name, call_id = (optional_text(item.get(key), f'{where}, "{key}",', notes) for key in ("name", "tool_call_id"))
    texts = results_in_text(optional_text(content, where, notes))
    return [Turn("tool", text, name=name, call_id=call_id if len(texts) == 1 else "") for text in texts]


def _called(item: dict[str, Any], content: Any, where: str, notes: list[str]) -> Turn:
    """A function_call turn: the JSON of calls, perhaps behind a thought."""
    text = text_of(content, where, notes)
    before, mark, after = text.partition("</think>")
    calls = calls_of(after if mark else text, where)
    return _marked(item, Turn("assistant", f"{before}{mark}".strip() if mark else "", tool_calls=calls), where, notes)


def _answer(item: dict[str, Any], content: Any, where: str, notes: list[str]) -> Turn:
    """An answer with its calls, its thought, and what the marks in its object say of it."""
    key = next((key for key in _CALL_KEYS if item.get(key)), None)
    calls = calls_of(item[key], f'{where}, "{key}",') if key else ()
    turn = Turn("assistant", optional_text(content, where, notes)) if calls else answer_turn(content, where, notes)
    thought = next((item[key] for key in _THOUGHT_KEYS if isinstance(item.get(key), str) and item[key].strip()), "")
    thought = text_of(thought, f"{where}, the thought", notes)
    return _marked(item, replace(turn, thought=thought, tool_calls=calls), where, notes)


def _marked(item: dict[str, Any], turn: Turn, where: str, notes: list[str]) -> Turn:
    for call in turn.tool_calls:
        text_of(call.name + call.arguments, f"{where}, the call of {quoted(call.name)},", notes)
    try:
        weight = learning_weight(item, notes)
    except ValueError as reason:
        raise UnusableRecord(f"{where} has {reason}") from None
    return replace(turn, learn=weight > 0, weight=weight or 1.0)
