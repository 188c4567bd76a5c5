"""What a record means: which of the known shapes it has, and the conversation or document in it.

Knows keys, roles and the order of turns. Does not know files, lines, templates or tokenizers.

The known shapes and the keys they go by:
    instruction/input/output    also instruction/context/response, and with `history` ([[question, answer], ...])
    input/output lists          {"input": ["hi", "bye"], "output": ["hello", "see you"]}
    prompt/response             also prompt/completion, question/answer, query/response, ask/answer, input/output,
                                input/target, inputs/targets
    ShareGPT conversations      {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}
    OpenAI messages             {"messages": [{"role": "user", "content": ...}, ...]}
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

from onecard.data.columns import THOUGHT, Columns, pair_of, renamed
from onecard.data.learn_marks import MARKS, NOT_A_GOOD_ANSWER, is_to_learn, record_mark
from onecard.data.messages import Conversation, Document, Role, Turn
from onecard.data.thoughts import with_thought
from onecard.data.values import UnusableRecord, kind_of, optional_text, quoted, safe, text_of

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
}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_READ_IN_TURNS = frozenset(("role", "content", "from", "value", "tool_calls", "function_call", THOUGHT)) | MARKS
_PREFERENCE = (
    'a preference pair ("chosen" and "rejected"): which of two answers is better is not learned here; to learn the '
    'chosen answers, give each as "response" beside its "prompt"'
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")

CUT_LEADING = "leading assistant turns were cut: nothing asked for them"
CUT_TRAILING = "trailing turns without an answer were cut"
JOINED = "turns of the same role in a row were joined with a blank line"
FIRST_OF_SEVERAL = "an answer is a list of several: the first one is learned"
ONLY_OF_LIST = "an answer is a list of one text: that one is learned"
INPUT_AS_QUESTION = "`input` was taken as the question: the instruction is empty"


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
    for shape in _SHAPES:
        # A column that is there for other rows only is null in this one.
        if all(value.get(key) is not None for key in shape.required):
            break
    else:
        nulls = tuple(key for key, content in value.items() if content is None)
        raise UnusableRecord(_PREFERENCE if _has_pair(value) else _unknown_shape(tuple(map(str, value)), nulls))
    if _has_pair(value) and shape.convert is _from_turns and not _ends_with_answer(value[shape.required[0]]):
        raise UnusableRecord(_PREFERENCE)
    notes: list[str] = []
    known = (*shape.required, *shape.optional, THOUGHT)
    marks = {key: record_mark(str(key), value[key]) for key in value if key not in known}
    ignored = [key for key, mark in marks.items() if mark is None]
    if shape.name == "text":
        text = text_of(value["text"], '"text"', notes)
        if not text.strip():
            raise UnusableRecord('"text" is empty')
        return ParsedRecord(Document(text, record), shape.name, notes, ignored)
    name, turns = shape.convert(value, shape, notes)
    ordered = _in_order(_with_thought(turns, value, notes), notes)
    if False in marks.values():
        notes.append(NOT_A_GOOD_ANSWER)
        ordered = tuple(replace(turn, learn=turn.role != "assistant") for turn in ordered)
    if shape.convert is _from_turns:
        ignored += _unused_keys(value[shape.required[0]], shape.required[0])
    return ParsedRecord(Conversation(ordered, record), name, notes, ignored)


def _with_thought(turns: list[Turn], item: dict[str, Any], notes: list[str]) -> list[Turn]:
    """The turns with the thought of `item`, if there is one, in front of the last answer."""
    thought = optional_text(item.get(THOUGHT), "the thought", notes).strip()
    if not thought or not turns or turns[-1].role != "assistant":
        return turns
    return [*turns[:-1], replace(turns[-1], content=with_thought(thought, turns[-1].content))]


def _has_pair(record: dict[str, Any]) -> bool:
    return record.get("chosen") is not None and record.get("rejected") is not None


def _ends_with_answer(turns: Any) -> bool:
    last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
    return isinstance(last, dict) and _role_of(last.get("role", last.get("from"))) == "assistant"


def _unused_keys(turns: list[Any], name: str) -> list[str]:
    """Keys inside the turns that nothing reads, as they are named in the report: messages[].reasoning_content."""
    return [
        f"{name}[].{key}"
        for turn in turns
        if not _READ_IN_TURNS.issuperset(turn)
        for key, content in turn.items()
        if key not in _READ_IN_TURNS and content is not None and key not in (pair_of(turn) or ())
    ]


def _answer(value: Any, where: str, notes: list[str]) -> Turn:
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], dict):
            value = _joined_parts(value, where, notes)
        else:
            notes.append(FIRST_OF_SEVERAL if len(value) > 1 else ONLY_OF_LIST)
            value = value[0]
    text = text_of(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: there is no answer to learn")
    return Turn("assistant", text)


def _question(value: Any, where: str, notes: list[str]) -> Turn:
    text = text_of(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: nothing was asked")
    return Turn("user", text)


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
    answer = _answer(record[answer_key], f'"{answer_key}"', notes)
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
            turns += _turns(pair, f'"history" entry {number}', notes)
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            size = f"{kind_of(pair)} of {len(pair)}" if isinstance(pair, (list, tuple)) else kind_of(pair)
            raise UnusableRecord(f'"history" entry {number} is {size}, a [question, answer] pair is expected')
        turns.append(_question(pair[0], f'"history" entry {number}, question,', notes))
        turns.append(_answer(pair[1], f'"history" entry {number}, answer,', notes))
    return turns


def _from_lists(record: dict[str, Any], answer_key: str, notes: list[str]) -> list[Turn]:
    """{"input": ["hi", "bye"], "output": ["hello", "see you"]}; a text under "instruction" is the system turn."""
    questions, answers = record["input"], record[answer_key]
    if len(questions) not in (len(answers), len(answers) + 1):
        raise UnusableRecord(f'"input" has {len(questions)} turns and "{answer_key}" has {len(answers)}')
    turns = _system(record, notes) or _system(record, notes, "instruction")
    for number, question in enumerate(questions, start=1):
        turns.append(_question(question, f'"input" turn {number}', notes))
        if number <= len(answers):
            turns.append(_answer(answers[number - 1], f'"{answer_key}" turn {number}', notes))
    return turns


def _from_turns(record: dict[str, Any], shape: _Shape, notes: list[str]) -> tuple[str, list[Turn]]:
    """A list of turns, each {"role", "content"} or {"from", "value"}."""
    key = shape.required[0]
    items = record[key]
    if not isinstance(items, (list, tuple)) or not items:
        raise UnusableRecord(f'"{key}" is {kind_of(items)}, a list of turns is expected')
    turns = _system(record, notes)
    for number, item in enumerate(items, start=1):
        for turn in _turns(item, f"turn {number}", notes):
            if turn.role == "system" and not turn.content.strip():
                continue
            if turn.role == "system" and turns:
                raise UnusableRecord(f"turn {number} is a system turn, which is known only at the start")
            turns.append(turn)
    return shape.name, turns


def _turns(item: Any, where: str, notes: list[str]) -> list[Turn]:
    """The turn that an object holds, or both turns of one such as {"human": ..., "assistant": ...}."""
    keys = pair_of(item)
    if keys is None or keys[1] is None:
        return _with_thought([_turn(item, where, notes)], item, notes)
    question, answer = (f'{where}, "{key}",' for key in keys)
    turns = [_question(item[keys[0]], question, notes), _learned(item, item[keys[1]], answer, notes)]
    return _with_thought(turns, item, notes)


def _turn(item: Any, where: str, notes: list[str]) -> Turn:
    if not isinstance(item, dict):
        raise UnusableRecord(f'{where} is {kind_of(item)}, {{"role", "content"}} or {{"from", "value"}} is expected')
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if role_key not in item or (text_key not in item and not item.get("tool_calls")):
        seen = ", ".join(quoted(str(key)) for key in list(item)[:6]) or "nothing"
        raise UnusableRecord(f'{where} has {seen}; "role" and "content", or "from" and "value" are expected')
    name = item[role_key]
    role = _role_of(name)
    if item.get("tool_calls") or item.get("function_call") or name in _TOOL_ROLES:
        raise UnusableRecord(f"{where} is a tool call or its result, which no template here can render")
    if role is None:
        shown = quoted(name) if type(name) is str else kind_of(name)
        raise UnusableRecord(f"{where} has the {role_key} {shown}; known: {', '.join(ROLES)}")
    content = item[text_key]
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content, where, notes)
    if role == "assistant":
        return _learned(item, content, where, notes)
    return _question(content, where, notes) if role == "user" else Turn("system", optional_text(content, where, notes))


def _learned(item: dict[str, Any], content: Any, where: str, notes: list[str]) -> Turn:
    """An answer with what the marks in its object say of it."""
    try:
        learn = is_to_learn(item, notes)
    except ValueError as reason:
        raise UnusableRecord(f"{where} has {reason}") from None
    return Turn("assistant", _answer(content, where, notes).content, learn=learn)


def _role_of(name: Any) -> Role | None:
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _joined_parts(parts: list[Any] | tuple[Any, ...], where: str, notes: list[str]) -> str:
    """The text of content parts, one per line: texts, or {"type": "text", "text" or "value" or "content": ...}.

    Parts of any other type are refused.
    """
    texts = []
    for number, part in enumerate(parts, start=1):
        place = f"{where}, part {number},"
        if isinstance(part, str):
            texts.append(text_of(part, place, notes))
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in (None, *_TEXT_PARTS):
            what = f"of type {quoted(kind)}" if isinstance(kind, str) else kind_of(part)
            raise UnusableRecord(f"{place} is {what}; only text can be learned")
        key = next((key for key in _TEXT_KEYS if part.get(key) is not None), None)
        if key is None:
            seen = ", ".join(quoted(str(key)) for key in list(part)[:6]) or "nothing"
            raise UnusableRecord(f'{place} has no text: its keys are {seen}, and "text" is expected')
        texts.append(text_of(part[key], f'{place} "{key}"', notes))
    return "\n".join(texts)


def _in_order(turns: list[Turn], notes: list[str]) -> tuple[Turn, ...]:
    """The turns as [system], user, assistant, ..., user, assistant; what had to be cut or joined goes to `notes`.

    assistant a, user b, user c, assistant d, user e  ->  user "b\\n\\nc", assistant d; three notes
    """
    system, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ([], turns)
    if rest and rest[0].role == "assistant":
        notes.append(CUT_LEADING)
        while rest and rest[0].role == "assistant":
            rest = rest[1:]
    ordered: list[Turn] = []
    for turn in rest:
        if ordered and ordered[-1].role == turn.role:
            both = f"{ordered[-1].content}\n\n{turn.content}"
            ordered[-1] = Turn(turn.role, both, learn=ordered[-1].learn and turn.learn)
            notes.append(JOINED)
        else:
            ordered.append(turn)
    if ordered and ordered[-1].role == "user":
        notes.append(CUT_TRAILING)
        ordered.pop()
    if not ordered:
        raise UnusableRecord("there is no question with an answer to learn")
    return (*system, *ordered)


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
    _Shape("OpenAI messages", ("messages",), ("system",), _from_turns),
    _Shape("ShareGPT conversations", ("conversations",), ("system",), _from_turns),
    _Shape("conversation", ("conversation",), ("system",), _from_turns),
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
SHAPE_NAMES = tuple(shape.name for shape in _SHAPES)
