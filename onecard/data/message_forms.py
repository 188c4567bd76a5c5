"""Which form of tool calls and thoughts a chat template takes, found out by rendering probes.

Templates differ: arguments as an object (Qwen, Llama, Mistral) or as text (DeepSeek), ids of nine characters (Mistral),
thoughts under a key of their own (Qwen3, gpt-oss) or in the content.

Knows turns and Jinja. Does not know tokenizers or masks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from onecard.data.jinja_chat import render_chat
from onecard.data.messages import ToolCall, Turn, turns_to_messages
from onecard.data.thoughts import split_thought, with_thought
from onecard.errors import DataError

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
_PROBE = "onecard_probe"
_ASKED = Turn("user", "question")


@dataclass(frozen=True)
class CallForm:
    """How tool calls are given to a template: arguments as text, and ids that are nine characters."""

    arguments_as_text: bool = False
    short_ids: bool = False

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Messages of these turns in this form."""
        messages = turns_to_messages(_with_short_ids(turns) if self.short_ids else turns)
        for message in messages if self.arguments_as_text else ():
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return messages


@lru_cache(maxsize=32)
def call_form(jinja: str) -> CallForm:
    """The first form in which the template writes a call and its result down; the plain one where there is none."""
    probe = (_ASKED, Turn("assistant", "", tool_calls=(ToolCall(_PROBE, '{"x": 1}'),)), Turn("tool", "result"))
    forms = [CallForm(as_text, short_ids) for as_text in (False, True) for short_ids in (False, True)]
    return next((form for form in forms if _PROBE in _rendered(jinja, form.messages(probe))), CallForm())


@lru_cache(maxsize=32)
def thought_key(jinja: str) -> str:
    """The key of a message under which the template reads the thought of an answer, or ""."""
    for key in ("reasoning_content", "thinking", "reasoning"):
        if _PROBE in _rendered(jinja, [*turns_to_messages([_ASKED]), _answer(**{key: _PROBE})]):
            return key
    return ""


@lru_cache(maxsize=32)
def reads_thought_in_text(jinja: str) -> bool:
    """Whether the template finds a thought in the content, as a model writes it."""
    return "</think>" in jinja or not thought_key(jinja)


def with_thoughts_for(jinja: str, turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns with each thought where the template looks for it: apart, or in front of the answer."""
    if not any(turn.thought or "</" in turn.content for turn in turns):
        return turns
    return [_with_thought_for(jinja, turn) if turn.role == "assistant" else turn for turn in turns]


def messages_for(jinja: str, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Messages for this template, of turns that went through `with_thoughts_for`."""
    has_calls = any(turn.tool_calls or turn.role == "tool" for turn in turns)
    messages = call_form(jinja).messages(turns) if has_calls else turns_to_messages(turns)
    if any(turn.thought for turn in turns):
        for message in messages:
            if "reasoning_content" in message:
                message[thought_key(jinja) or "reasoning_content"] = message.pop("reasoning_content")
    return messages


def _with_thought_for(jinja: str, turn: Turn) -> Turn:
    if turn.thought:
        if thought_key(jinja):
            return turn
        return replace(turn, content=with_thought(turn.thought, turn.content), thought="")
    if "</" in turn.content and not reads_thought_in_text(jinja):
        thought, content = split_thought(turn.content)
        return replace(turn, thought=thought, content=content) if thought else turn
    return turn


def _with_short_ids(turns: Sequence[Turn]) -> list[Turn]:
    """Calls and results with ids of nine characters: as they are, or made of what they are or of their place."""
    found: list[Turn] = []
    waiting: list[str] = []
    n_calls = 0
    for turn in turns:
        if turn.tool_calls:
            calls = tuple(replace(call, id=_short(call.id, n_calls + k)) for k, call in enumerate(turn.tool_calls))
            n_calls += len(calls)
            waiting = [call.id for call in calls]
            turn = replace(turn, tool_calls=calls)
        elif turn.role == "tool":
            own = _short(turn.call_id, 0) if turn.call_id else ""
            call_id = own if own in waiting or not waiting else waiting[0]
            waiting = [each for each in waiting if each != call_id]
            turn = replace(turn, call_id=call_id or _short("", n_calls))
        found.append(turn)
    return found


def _short(call_id: str, number: int) -> str:
    if not call_id:
        return f"call{number:05d}"
    return call_id if _SHORT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _answer(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "answer", **more}


def _rendered(jinja: str, messages: Sequence[dict[str, Any]]) -> str:
    try:
        return render_chat(jinja, messages, _TOKENS, False)
    except DataError:
        return ""
