"""Formats of records: which of the known ones a record has, and the conversation or document in it.

Knows keys, roles and the order of turns. Does not know files, lines, templates or tokenizers.

The known shapes and the keys they go by:
    instruction/input/output    also instruction/context/response, and with `history` ([[question, answer], ...])
    input/output lists          {"input": ["hi", "bye"], "output": ["hello", "see you"]}
    prompt/response             also prompt/completion, question/answer, query/response, ask/answer, input/output,
                                input/target, inputs/targets
    ShareGPT conversations      {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}
    OpenAI messages             {"messages": [{"role": "user", "content": ...}, ...]}; TRL: "prompt" and "completion"
    conversation                {"conversation": [{"human": ..., "assistant": ...}, ...]}
    text                        {"text": ...}
Any of them but `text` may have a `system` text. An answer, or a record, that is marked as not to be learned (see
learn_marks.py) stays, and is not learned. Fields of other names are read through columns.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from onecard.data.columns import THOUGHT, Columns, renamed
from onecard.data.content_parts import refuse_media
from onecard.data.learn_marks import LABELS, NOT_A_GOOD_ANSWER, record_mark
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.preference import CHOSEN_LEARNED, REJECTED_UNUSABLE, both_sides, check_sides, has_pair
from onecard.data.thoughts import has_thought
from onecard.data.tool_calls import TOOL_FIELDS, lists_tools, tool_list, tools_in_system
from onecard.data.turn_objects import (
    add_thought,
    answer_turn,
    question_turn,
    role_of,
    turns_in,
    unused_keys,
    with_calls_of_text,
)
from onecard.data.turn_order import in_order
from onecard.data.values import UnusableRecord, kind_of, optional_text, quoted, safe, text_of

INPUT_AS_QUESTION = "`input` was taken as the question: the instruction is empty"
TOOLS_IN_SYSTEM = "the system text lists the tools itself: the list of the record is not written again"
HERMES_SYSTEM = "a system text in Hermes' wording was taken as the list of tools that it holds"
ANSWERS_THINK = "answers hold thoughts"
TOOLS_CALLED = "answers call tools"


@dataclass(slots=True)
class ParsedRecord:
    """A sample, the shape it was found in, what was changed to make it usable, and the fields nobody reads."""

    sample: Conversation | Document
    shape: str
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any], _Shape, list[str]], tuple[str, list[Turn]]]


def to_sample(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
    """The conversation or document in one parsed record; `columns`: other names of its fields.

    {"instruction": "Add", "input": "2 3", "output": "5"}
        -> Conversation((Turn("user", "Add", "2 3"), Turn("assistant", "5")), record), "instruction/input/output"
    Raises UnusableRecord.
    """
    if not isinstance(value, dict):
        raise UnusableRecord(f"the record is {kind_of(value)}, an object with keys is expected")
    if columns:
        value = renamed(value, columns)
    value = _whole_conversation(value)
    # A column that is there for other rows only is null in this one.
    shape = next((shape for shape in _SHAPES if all(value.get(key) is not None for key in shape.required)), None)
    if shape is None or (shape.convert is _from_turns and not _ends_with_answer(value, shape)):
        if has_pair(value):
            return _preference(value, record)
        check_sides(value)
    if shape is None:
        nulls = tuple(key for key, content in value.items() if content is None)
        raise UnusableRecord(_unknown_shape(tuple(map(str, value)), nulls))
    notes: list[str] = []
    known = (*shape.required, *shape.optional, THOUGHT)
    marks = {key: record_mark(str(key), value[key]) for key in value if key not in known}
    ignored = [key for key, mark in marks.items() if mark is None]
    if shape.name == "text":
        text = text_of(value["text"], '"text"', notes)
        if not text.strip():
            raise UnusableRecord('"text" is empty')
        refuse_media(value, [text], notes)
        return ParsedRecord(Document(text, record), shape.name, notes, ignored)
    name, turns = shape.convert(value, shape, notes)
    ordered = in_order(add_thought(turns, value, notes), notes)
    refuse_media(value, (turn.content for turn in ordered), notes)
    if any(turn.thought or has_thought(turn.content) for turn in ordered if turn.role == "assistant"):
        notes.append(ANSWERS_THINK)
    if any(turn.tool_calls for turn in ordered):
        notes.append(TOOLS_CALLED)
    if False in marks.values():
        notes.append(NOT_A_GOOD_ANSWER)
        ordered = tuple(replace(turn, learn=turn.role != "assistant") for turn in ordered)
    if shape.convert is _from_turns:
        ignored += unused_keys(value[shape.required[0]], shape.required[0])
    label = next((mark for key, mark in marks.items() if key in LABELS and mark is not None), None)
    return ParsedRecord(Conversation(ordered, record, label=label), name, notes, ignored)


def _whole_conversation(record: dict[str, Any]) -> dict[str, Any]:
    """TRL's prompt and completion as messages are one conversation; any other record stays as it is."""
    sides = [record.get(key) for key in ("prompt", "completion")]
    if not all(isinstance(side, (list, tuple)) and side and isinstance(side[0], dict) for side in sides):
        return record
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return {**rest, "messages": [turn for side in sides for turn in side or ()]}


def _preference(value: dict[str, Any], record: str) -> ParsedRecord:
    """A pair of answers: the chosen one is the sample, with the turns of the rejected one beside it."""
    better, worse = both_sides(value, ANSWERS)
    try:
        parsed = to_sample(better, record)
    except UnusableRecord as reason:
        raise UnusableRecord(f'the conversation with the "chosen" answer: {reason}') from None
    parsed.shape = f"preference pair ({parsed.shape})"
    parsed.notes.append(CHOSEN_LEARNED)
    try:
        rejected = to_sample(worse, record).sample
        assert isinstance(parsed.sample, Conversation) and isinstance(rejected, Conversation)
        parsed.sample = replace(parsed.sample, rejected=rejected.turns)
    except UnusableRecord:
        parsed.notes.append(REJECTED_UNUSABLE)
    return parsed


def _ends_with_answer(record: dict[str, Any], shape: _Shape) -> bool:
    turns = record[shape.required[0]]
    return isinstance(turns, (list, tuple)) and bool(turns) and role_of(turns[-1]) == "assistant"


def _system(record: dict[str, Any], notes: list[str], key: str = "system") -> list[Turn]:
    text = optional_text(record.get(key), f'"{key}"', notes)
    return [Turn("system", text)] if text.strip() else []


def _from_pair(record: dict[str, Any], shape: _Shape, notes: list[str]) -> tuple[str, list[Turn]]:
    """A question and an answer, with or without a second input field and a history."""
    question_key, answer_key = shape.required
    if isinstance(record.get("input"), (list, tuple)) and isinstance(record[answer_key], (list, tuple)):
        return "input/output lists", _from_lists(record, answer_key, notes)
    history, name = _history(record, notes), shape.name
    input_keys = [key for key in ("context", "input") if key in shape.optional]
    input_key = next((key for key in input_keys if record.get(key)), input_keys[-1] if input_keys else "")
    question = optional_text(record.get(question_key), f'"{question_key}"', notes)
    second = optional_text(record.get(input_key), f'"{input_key}"', notes) if input_key else ""
    if not second.strip():
        second = ""
    if not question.strip():
        if not second:
            both = f'"{question_key}" and "{input_key}" are' if input_key else f'"{question_key}" is'
            raise UnusableRecord(f"{both} empty: nothing was asked")
        notes.append(INPUT_AS_QUESTION)
        question, second = second, ""
    answer = answer_turn(record[answer_key], f'"{answer_key}"', notes)
    system = _system(record, notes)
    if any(turn.role == "system" for turn in history[not system :]):
        raise UnusableRecord('"history" has a system turn, which is known only at the start')
    turns = [*system, *history, Turn("user", question, second), answer]
    return f"{name} + history" if history else name, turns


def _history(record: dict[str, Any], notes: list[str]) -> list[Turn]:
    history = record.get("history")
    if history is None or history in ("", []):
        return []
    if not isinstance(history, (list, tuple)):
        raise UnusableRecord(f'"history" is {kind_of(history)}, a list of [question, answer] pairs is expected')
    turns: list[Turn] = []
    for number, pair in enumerate(history, start=1):
        if isinstance(pair, dict):
            turns += turns_in(pair, f'"history" entry {number}', notes)
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            size = f"{kind_of(pair)} of {len(pair)}" if isinstance(pair, (list, tuple)) else kind_of(pair)
            raise UnusableRecord(f'"history" entry {number} is {size}, a [question, answer] pair is expected')
        turns.append(question_turn(pair[0], f'"history" entry {number}, question,', notes))
        turns.append(answer_turn(pair[1], f'"history" entry {number}, answer,', notes))
    return turns


def _from_lists(record: dict[str, Any], answer_key: str, notes: list[str]) -> list[Turn]:
    """{"input": ["hi", "bye"], "output": ["hello", "see you"]}; a text under "instruction" is the system turn."""
    questions, answers = record["input"], record[answer_key]
    if len(questions) not in (len(answers), len(answers) + 1):
        raise UnusableRecord(f'"input" has {len(questions)} turns and "{answer_key}" has {len(answers)}')
    turns = _system(record, notes) or _system(record, notes, "instruction")
    for number, question in enumerate(questions, start=1):
        turns.append(question_turn(question, f'"input" turn {number}', notes))
        if number <= len(answers):
            turns.append(answer_turn(answers[number - 1], f'"{answer_key}" turn {number}', notes))
    return turns


def _from_turns(record: dict[str, Any], shape: _Shape, notes: list[str]) -> tuple[str, list[Turn]]:
    """A list of turns, each {"role", "content"} or {"from", "value"}."""
    key = shape.required[0]
    items = record[key]
    if not isinstance(items, (list, tuple)) or not items:
        raise UnusableRecord(f'"{key}" is {kind_of(items)}, a list of turns is expected')
    turns = _system(record, notes)
    for number, item in enumerate(items, start=1):
        for turn in turns_in(item, f"turn {number}", notes):
            if turn.role == "system" and not turn.content.strip():
                continue
            if turn.role == "system" and turns:
                raise UnusableRecord(f"turn {number} is a system turn, which is known only at the start")
            turns.append(turn)
    return shape.name, _with_tools(turns, record, notes)


def _with_tools(turns: list[Turn], record: dict[str, Any], notes: list[str]) -> list[Turn]:
    """The turns with the tools that may be called, from a field of the record or Hermes' system text."""
    key = next((key for key in TOOL_FIELDS if record.get(key)), None)
    tools = tool_list(record[key], quoted(key)) if key else ""
    head = turns[:1] if turns and turns[0].role == "system" else []
    listed = tools_in_system(head[0].content) if head else None
    if not listed and tools and head and lists_tools(head[0].content):
        notes.append(TOOLS_IN_SYSTEM)
        return turns
    rest = turns[len(head) :]
    if listed:
        notes.append(HERMES_SYSTEM)
        head, tools = [], tools or listed
    if not tools:
        return turns
    text_of(tools, "the list of tools", notes)
    return [*head, Turn("tool_list", tools), *map(with_calls_of_text, rest)]


@lru_cache(maxsize=512)
def _unknown_shape(keys: tuple[str, ...], nulls: tuple[str, ...]) -> str:
    """Why no shape fits: the missing half of the nearest one, the keys seen, the nearest name, the known shapes."""
    present = set(keys) - set(nulls)
    seen = ", ".join(quoted(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")
    half_found = [shape for shape in _SHAPES if present & set(shape.required)]
    for shape in half_found or [shape for shape in _SHAPES if set(nulls) & set(shape.required)]:
        null = [key for key in shape.required if key in nulls]
        if null:
            return f'"{null[0]}" is null' + ("" if half_found else f"; keys seen: {seen}")
    names = sorted({key for shape in _SHAPES for key in shape.required})
    close = [(key, match) for key in keys for match in get_close_matches(key.lower(), names, 1, 0.75) if match != key]
    hint = "; did you mean " + " and ".join(f'"{m}" for {quoted(k)}' for k, m in close[:2]) + "?" if close else ""
    if half_found and not hint:
        shape = half_found[0]
        missing = next(key for key in shape.required if key not in present)
        has = next(key for key in shape.required if key in present)
        return (
            f'"{has}" is there, but "{missing}" is missing; keys seen: {seen}; '
            f"a field of another name is read with --columns NAME:{missing}"
        )
    known = "; ".join("/".join(shape.required) for shape in _SHAPES)
    names_of = f"--columns {safe(keys[0], 30)}:instruction,{safe(keys[-1], 30)}:output" if len(keys) > 1 else ""
    other = f"; other names for question and answer: {names_of}" if names_of else ""
    return f"unknown shape: keys seen: {seen or 'none'}{hint}{other}; known shapes: {known}"


def _pair(name: str, question: str, answer: str, *optional: str) -> _Shape:
    return _Shape(name, (question, answer), (*optional, "history", "system"), _from_pair)


# Order matters: the fullest form first, so that a `text` or `prompt` beside `messages` is not taken instead of them.
_SHAPES = (
    _Shape("OpenAI messages", ("messages",), ("system", *TOOL_FIELDS), _from_turns),
    _Shape("ShareGPT conversations", ("conversations",), ("system", *TOOL_FIELDS), _from_turns),
    _Shape("conversation", ("conversation",), ("system", *TOOL_FIELDS), _from_turns),
    _pair("instruction/input/output", "instruction", "output", "input"),
    _pair("instruction/context/response", "instruction", "response", "input", "context"),
    _pair("input/output", "input", "output"),
    _pair("prompt/response", "prompt", "response"),
    _pair("prompt/completion", "prompt", "completion"),
    _pair("question/answer", "question", "answer"),
    _pair("query/response", "query", "response"),
    _pair("ask/answer", "ask", "answer"),
    _pair("input/target", "input", "target"),
    _pair("inputs/targets", "inputs", "targets"),
    _Shape("text", ("text",), (), _from_pair),
)
# The answers that go with a question, by its key.
ANSWERS = {
    question: tuple(shape.required[1] for shape in _SHAPES if shape.required[0] == question)
    for question in (shape.required[0] for shape in _SHAPES if len(shape.required) == 2)
}


def required_keys(name: str) -> list[str]:
    """The keys that a shape goes by; none for what is no shape's name.

    "input/output lists" -> ["input", "output"]    "preference pair (text)" -> ["chosen", "rejected"]
    """
    if name.startswith("preference pair"):
        return ["chosen", "rejected"]
    return next((list(shape.required) for shape in _SHAPES if shape.name == name.removesuffix(" lists")), [])
