"""No message may vanish in a template: what it leaves out is found by rendering marks, then joined or refused.

Knows turns and roles. Does not know Jinja, tokenizers or masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from onecard.data.messages import Role, Turn
from onecard.errors import DataError

_MOST_SHAPES = 4096
_Way = Callable[[Sequence[Turn]], list[Turn]]


class TurnKeeper:
    """Turns as a template can show them all; asks once for each order of roles.

    Args:
        render: the text of turns; the flag says whether a generation prompt follows. Raises DataError as it likes.
    """

    def __init__(self, render: Callable[[Sequence[Turn], bool], str]) -> None:
        self._render = render
        self._joins: dict[tuple[bool, tuple[Role, ...]], _Way | None] = {}

    def kept(self, turns: Sequence[Turn], *, prompt: bool) -> Sequence[Turn]:
        """The turns themselves, or with system turns joined to their neighbours where the template would drop one.

        Raises DataError where the template drops a turn all the same.
        """
        shape = (prompt, tuple(turn.role for turn in turns))
        if shape not in self._joins:
            if len(self._joins) >= _MOST_SHAPES:
                self._joins.clear()
            self._joins[shape] = self._way(shape[1], prompt)
        way = self._joins[shape]
        return way(turns) if way else turns

    def _way(self, roles: Sequence[Role], prompt: bool) -> _Way | None:
        marks = [Turn(role, f"onecard probe {k:05d}") for k, role in enumerate(roles)]
        lost = first_lost = self._lost(marks, marks, prompt)
        if not lost:
            return None
        if any(turn.role == "system" for turn in lost):
            for way in (joined_system_turns, without_system_turns):
                lost = self._lost(marks, way(marks), prompt)
                if not lost:
                    return way
        number = marks.index(first_lost[0]) + 1
        raise DataError(
            f"the prompt template leaves out message {number} of {len(marks)} ({first_lost[0].role}); "
            "choose another template with --prompt_type"
        )

    def _lost(self, marks: Sequence[Turn], written: Sequence[Turn], prompt: bool) -> list[Turn]:
        try:
            text = self._render(written, prompt)
        except DataError:  # the turns themselves will be refused with the template's own words
            return []
        return [turn for turn in marks if turn.content not in text]


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
