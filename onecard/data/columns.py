"""Other names of columns: which field of a record is read as which (`--columns ask:instruction,answer:output`).

Knows names of fields, and those under which data sets keep thoughts and pairs of turns. Does not know what a record
means (formats.py).
"""

from __future__ import annotations

from typing import Any

from onecard.data.values import UnusableRecord, quoted

Columns = tuple[tuple[str, str], ...]  # (name in the data, name that is read)

# A record that has a field of this name got it from `renamed`: a field "thought" that nobody asked for is not read.
THOUGHT = "<thought>"
_THOUGHT_NAMES = frozenset(
    ("cot", "complex_cot", "chain_of_thought", "rationale", "reasoning", "reasoning_content", "think", "thinking",
     "thought", "thoughts")
)  # fmt: skip
TURN_LISTS = ("messages", "conversations", "conversation")
_QUESTION_KEYS = ("human", "user", "question", "query", "prompt", "instruction", "ask", "q", "input")
_ANSWER_KEYS = ("assistant", "gpt", "bot", "answer", "response", "output", "completion", "target", "a")


def renamed(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The record, and each of its turns, with the names that are read. Raises UnusableRecord: a name that is taken.

    {"ask": "Hi", "cot": "Hm"}, (("ask", "instruction"), ("cot", "thought")) -> {"instruction": "Hi", "<thought>": "Hm"}
    """
    names = dict(columns)
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = names.get(key, key)
        name = THOUGHT if name == "thought" and key in names else name
        if found.get(name) is not None and value is not None:
            raise UnusableRecord(f"two of its fields would be read as {quoted(names.get(key, key))} (--columns)")
        if name in (*TURN_LISTS, "history") and isinstance(value, (list, tuple)):
            value = [renamed(turn, columns) if isinstance(turn, dict) else turn for turn in value]
        found[name] = value if found.get(name) is None else found[name]
    return found


def thought_hints(ignored: list[str]) -> list[str]:
    """How to learn the thoughts in fields that nothing reads: ["messages[].reasoning_content"] -> one line."""
    names = dict.fromkeys(key.rpartition(".")[2] for key in ignored)
    held = [name for name in names if name.lower() in _THOUGHT_NAMES]
    return [f'"{name}" looks like thoughts: --columns {name}:thought learns it in front of the answer' for name in held]


def pair_of(item: Any) -> tuple[str, str | None] | None:
    """The keys of the question and of the answer where an object holds both turns, or only a question.

    {"human": "Hi", "assistant": "Hello"} -> ("human", "assistant")        {"role": "user", "content": "Hi"} -> None
    """
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return None
    question = next((key for key in _QUESTION_KEYS if item.get(key) is not None), None)
    answer = next((key for key in _ANSWER_KEYS if item.get(key) is not None), None)
    return None if question is None else (question, answer)
