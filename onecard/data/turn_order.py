"""The order of turns in a conversation: what is cut or joined where data keep another one.

Knows roles. Does not know keys or shapes of records.
"""

from __future__ import annotations

from dataclasses import replace

from onecard.data.messages import Turn
from onecard.data.values import UnusableRecord

CUT_LEADING = "leading assistant turns were cut: nothing asked for them"
CUT_TRAILING = "trailing turns without an answer were cut"
JOINED = "turns of the same role in a row were joined with a blank line"


def in_order(turns: list[Turn], notes: list[str]) -> tuple[Turn, ...]:
    """The turns as [system], [tool_list], user, assistant, ..., user, assistant; what is cut or joined goes to `notes`.

    assistant a, user b, user c, assistant d, user e  ->  user "b\\n\\nc", assistant d; three notes

    Results of tools stand between an answer that calls tools and the next answer, or question.
    Raises UnusableRecord: nothing is left, or a result that nothing called for.
    """
    n_head = next((k for k, turn in enumerate(turns) if turn.role not in ("system", "tool_list")), len(turns))
    head, rest = turns[:n_head], turns[n_head:]
    if rest and rest[0].role == "assistant":
        notes.append(CUT_LEADING)
        while rest and rest[0].role in ("assistant", "tool"):
            rest = rest[1:]
    ordered: list[Turn] = []
    for turn in rest:
        before = ordered[-1] if ordered else None
        if turn.role == "tool" and not (before and (before.role == "tool" or before.tool_calls)):
            raise UnusableRecord("the result of a tool stands where no tool was called")
        if before and before.role == turn.role != "tool" and not (before.tool_calls and not turn.tool_calls):
            ordered[-1] = _joined(before, turn)
            notes.append(JOINED)
        else:
            ordered.append(turn)
    if ordered and ordered[-1].role != "assistant":
        notes.append(CUT_TRAILING)
        while ordered and ordered[-1].role != "assistant":
            ordered.pop()
    if not ordered:
        raise UnusableRecord("there is no question with an answer to learn")
    return (*head, *ordered)


def _joined(first: Turn, second: Turn) -> Turn:
    """Both turns as one, learned as the one that counts less."""
    contents = [turn.content for turn in (first, second) if turn.content or not (first.tool_calls or second.tool_calls)]
    return replace(
        first,
        content="\n\n".join(contents),
        input="",
        learn=first.learn and second.learn,
        thought="\n\n".join(filter(None, (first.thought, second.thought))),
        tool_calls=first.tool_calls + second.tool_calls,
        weight=min(first.weight, second.weight),
    )
