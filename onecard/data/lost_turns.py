"""No message may vanish in a template: what it leaves out is found by rendering marks, then joined or refused.

Knows turns and roles. Does not know Jinja, tokenizers or masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from onecard.data.messages import Role, ToolCall, Turn, tools_of
from onecard.errors import DataError

_MOST_SHAPES = 4096
_NOTHING: dict[str, Any] = {"parameters": {"type": "object", "properties": {}}}
_Kind = tuple[Role, bool, int]  # role, whether there is a content, how many calls
_Rewrite = Callable[[Sequence[Turn]], list[Turn]]


class TurnKeeper:
    """Turns as a template can show them all; asks once for each order of roles.

    Args:
        render: the text of turns; the flag says whether a generation prompt follows. Raises DataError as it likes.
    """

    def __init__(self, render: Callable[[Sequence[Turn], bool], str]) -> None:
        self._render = render
        self._joins: dict[tuple[bool, tuple[_Kind, ...]], _Rewrite | None] = {}

    def kept(self, turns: Sequence[Turn], *, prompt: bool) -> Sequence[Turn]:
        """The turns themselves, or with system turns joined to their neighbours where the template would drop one.

        Raises DataError where the template drops a turn all the same.
        """
        kinds = [(turn.role, turn.content != "" or not turn.tool_calls, len(turn.tool_calls)) for turn in turns]
        shape = (prompt, tuple(kinds))
        if shape not in self._joins:
            if len(self._joins) >= _MOST_SHAPES:
                self._joins.clear()
            self._joins[shape] = self._find_rewrite(shape[1], prompt)
        rewrite = self._joins[shape]
        return rewrite(turns) if rewrite else turns

    def _find_rewrite(self, kinds: Sequence[_Kind], prompt: bool) -> _Rewrite | None:
        marks = [_marked(kind, k) for k, kind in enumerate(kinds)]
        lost = first_lost = self._lost(marks, marks, prompt)
        if not lost:
            return None
        if any(turn.role == "system" for turn in lost):
            for rewrite in (joined_system_turns, without_system_turns):
                lost = self._lost(marks, rewrite(marks), prompt)
                if not lost:
                    return rewrite
        turn = first_lost[0]
        bare = [replace(other, content="") if other.tool_calls else other for other in marks]
        if turn.tool_calls and turn.content and not self._lost(bare, bare, prompt):
            raise DataError(
                "the prompt template leaves out what is said, or thought, beside tool calls; --prompt_type chatml "
                "keeps it, and --thinking drop takes thoughts away"
            )
        if turn.role in ("tool", "tool_list") or turn.tool_calls:
            what = "tools" if turn.role == "tool_list" else "tool calls" if turn.tool_calls else "results of tools"
            raise DataError(
                f"the prompt template does not write {what} down; --prompt_type chatml does, as Hermes and Qwen do"
            )
        number = sum(other.role != "tool_list" for other in marks[: marks.index(turn) + 1])
        n_messages = sum(other.role != "tool_list" for other in marks)
        raise DataError(
            f"the prompt template leaves out message {number} of {n_messages} ({turn.role}); "
            "choose another template with --prompt_type"
        )

    def _lost(self, marks: Sequence[Turn], written: Sequence[Turn], prompt: bool) -> list[Turn]:
        try:
            text = self._render(written, prompt)
        except DataError:  # the turns themselves will be refused with the template's own words
            return []
        return [turn for turn in marks if not _is_shown(turn, text)]


def _marked(kind: _Kind, number: int) -> Turn:
    """A turn of this kind whose content and calls can be told from all others."""
    role, has_content, n_calls = kind
    mark = f"onecard probe {number:05d}"
    if role == "tool_list":
        return Turn(role, json.dumps([{"type": "function", "function": {"name": mark, "description": "", **_NOTHING}}]))
    calls = tuple(ToolCall(f"onecard_probe_{number:05d}_{k}") for k in range(n_calls))
    return Turn(role, mark if has_content else "", tool_calls=calls)


def _is_shown(turn: Turn, text: str) -> bool:
    marks = [tool["function"]["name"] for tool in tools_of([turn]) or ()] or [turn.content]
    return all(mark in text for mark in (*marks, *(call.name for call in turn.tool_calls)))


def joined_system_turns(turns: Sequence[Turn]) -> list[Turn]:
    """At most one system turn, the first; each later one joins the question after it, else the one before it.

    [user "Hi", assistant "Hello", system "Be brief.", user "Why?"] -> [..., user "Be brief.\\n\\nWhy?"]

    Raises DataError for a system turn that has no question beside it.
    """
    return _joined(turns, keep_first=True)


def without_system_turns(turns: Sequence[Turn]) -> list[Turn]:
    """As `joined_system_turns`, with the first one joined to its question, too: for templates that know none."""
    return _joined(turns, keep_first=False)


def _joined(turns: Sequence[Turn], *, keep_first: bool) -> list[Turn]:
    joined: list[Turn] = []
    waiting = ""
    for role, group in groupby(turns, lambda turn: turn.role):
        same = list(group)
        if role == "system":
            text = "\n\n".join(turn.content for turn in same if turn.content.strip())
            if keep_first and not joined:
                joined.append(replace(same[0], content=text))
            else:
                waiting = text
        elif role == "tool_list":
            joined += same
        elif role == "user" and waiting:
            joined += [replace(same[0], content=f"{waiting}\n\n{same[0].content}"), *same[1:]]
            waiting = ""
        else:
            joined = _after_question(joined, waiting) + same
            waiting = ""
    return _after_question(joined, waiting)


def _after_question(joined: list[Turn], text: str) -> list[Turn]:
    if not text:
        return joined
    if not joined:
        raise DataError("the prompt template leaves out a system message that no question follows; put one behind it")
    last = joined[-1]
    if last.role != "user":
        raise DataError(
            f"the prompt template leaves out the system message that follows message {len(joined)} "
            f"({last.role}); put it first, or beside a question"
        )
    if last.input:
        return [*joined[:-1], replace(last, input=f"{last.input}\n\n{text}")]
    return [*joined[:-1], replace(last, content=f"{last.content}\n\n{text}")]
