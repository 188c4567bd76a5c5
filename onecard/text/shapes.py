"""What a record means: which of the known shapes it has, and the conversation or document in it.

Knows keys, roles and the order of turns. Does not know files, lines, templates or tokenizers.

The known shapes and the keys they go by:
    instruction/input/output    also instruction/context/response, and with `history` ([[question, answer], ...])
    input/output lists          {"input": ["hi", "bye"], "output": ["hello", "see you"]}
    prompt/response             also prompt/completion, question/answer, query/response, input/output
    ShareGPT conversations      {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}
    OpenAI messages             {"messages": [{"role": "user", "content": ...}, ...]}
    text                        {"text": ...}
Any of them but `text` may have a `system` text. An answer, or a record, that is marked as not to be learned (see
learn_marks.py) stays, and is not learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from onecard.text.conversation import Conversation, Document, Role, Turn
from onecard.text.json_records import NumberText
from onecard.text.learn_marks import MARKS, NOT_A_GOOD_ANSWER, is_to_learn, record_mark

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
_READ_IN_TURNS = frozenset(("role", "content", "from", "value", "tool_calls", "function_call")) | MARKS
_PREFERENCE = (
    'a preference pair ("chosen" and "rejected"): which of two answers is better is not learned here; to learn the '
    'chosen answers, give each as "response" beside its "prompt"'
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")

CUT_LEADING = "leading assistant turns were cut: nothing asked for them"
CUT_TRAILING = "trailing turns without an answer were cut"
JOINED = "turns of the same role in a row were joined with a blank line"
NUMBER_AS_TEXT = "a number was taken as text, as it was written"
INPUT_AS_QUESTION = "`input` was taken as the question: the instruction is empty"


class UnusableRecord(Exception):
    """Why a record cannot be learned from, in words for the person who owns the file."""


@dataclass(slots=True)
class Shaped:
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


def to_sample(value: Any, record: str) -> Shaped:
    """The conversation or document in one parsed record.

    {"instruction": "Add", "input": "2 3", "output": "5"}
        -> Conversation((Turn("user", "Add", "2 3"), Turn("assistant", "5")), record), "instruction/input/output"
    Raises UnusableRecord.
    """
    if not isinstance(value, dict):
        raise UnusableRecord(f"the record is {kind_of(value)}, an object with keys is expected")
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
    known = (*shape.required, *shape.optional)
    marks = {key: record_mark(str(key), value[key]) for key in value if key not in known}
    ignored = [key for key, mark in marks.items() if mark is None]
    if shape.name == "text":
        text = _text(value["text"], '"text"', notes)
        if not text.strip():
            raise UnusableRecord('"text" is empty')
        return Shaped(Document(text, record), shape.name, notes, ignored)
    name, turns = shape.convert(value, shape, notes)
    ordered = _in_order(turns, notes)
    if False in marks.values():
        notes.append(NOT_A_GOOD_ANSWER)
        ordered = tuple(replace(turn, learn=turn.role != "assistant") for turn in ordered)
    if shape.convert is _from_turns:
        ignored += _unused_keys(value[shape.required[0]], shape.required[0])
    return Shaped(Conversation(ordered, record), name, notes, ignored)


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
        if key not in _READ_IN_TURNS and content is not None
    ]


def kind_of(value: Any) -> str:
    """A value's type in the words of a data file: "a list", "true", "null", "the number 5"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (NumberText, int, float)):
        return f"the number {safe(str(value))}"
    if isinstance(value, str):
        return "text" if value else "an empty text"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def safe(text: str, width: int = 60) -> str:
    """The text cut to `width` characters and printable anywhere: no control characters, no lone surrogates."""
    shown = text if len(text) <= width else text[: width - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def _quoted(key: str) -> str:
    return f'"{safe(key)}"'


def _text(value: Any, where: str, notes: list[str]) -> str:
    """`value` as text to learn, checked; `where` names it in the reason."""
    if type(value) is not str:
        is_number = isinstance(value, (NumberText, int, float)) and not isinstance(value, bool)
        if not is_number or str(value) in ("nan", "inf", "-inf"):
            raise UnusableRecord(f"{where} is {kind_of(value)}, text is expected")
        notes.append(NUMBER_AS_TEXT)
        return str(value)
    if "\0" in value:
        raise UnusableRecord(f"{where} holds a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise UnusableRecord(f"{where} holds the lone surrogate U+{code:04X}: half of a character") from None
    return value


def _optional_text(value: Any, where: str, notes: list[str]) -> str:
    # NaN is how pandas writes a missing text.
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return _text(value, where, notes)


def _answer(value: Any, where: str, notes: list[str]) -> Turn:
    text = _text(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: there is no answer to learn")
    return Turn("assistant", text)


def _question(value: Any, where: str, notes: list[str]) -> Turn:
    text = _text(value, where, notes)
    if not text.strip():
        raise UnusableRecord(f"{where} is empty: nothing was asked")
    return Turn("user", text)


def _system(record: dict[str, Any], notes: list[str], key: str = "system") -> list[Turn]:
    text = _optional_text(record.get(key), f'"{key}"', notes)
    return [Turn("system", text)] if text.strip() else []


def _from_pair(record: dict[str, Any], shape: _Shape, notes: list[str]) -> tuple[str, list[Turn]]:
    """A question and an answer, with or without a second input field and a history."""
    question_key, answer_key = shape.required
    if isinstance(record.get("input"), (list, tuple)) and isinstance(record[answer_key], (list, tuple)):
        return "input/output lists", _from_lists(record, answer_key, notes)
    history, name = _history(record, notes), shape.name
    input_keys = [key for key in ("context", "input") if key in shape.optional]
    input_key = next((key for key in input_keys if record.get(key)), input_keys[-1] if input_keys else "")
    question = _optional_text(record.get(question_key), f'"{question_key}"', notes)
    second = _optional_text(record.get(input_key), f'"{input_key}"', notes) if input_key else ""
    if not second.strip():
        second = ""
    if not question.strip():
        if not second:
            both = f'"{question_key}" and "{input_key}" are' if input_key else f'"{question_key}" is'
            raise UnusableRecord(f"{both} empty: nothing was asked")
        notes.append(INPUT_AS_QUESTION)
        question, second = second, ""
    answer = _answer(record[answer_key], f'"{answer_key}"', notes)
    turns = [*_system(record, notes), *history, Turn("user", question, second), answer]
    return f"{name} + history" if history else name, turns


def _history(record: dict[str, Any], notes: list[str]) -> list[Turn]:
    history = record.get("history")
    if history is None or history in ("", []):
        return []
    if not isinstance(history, (list, tuple)):
        raise UnusableRecord(f'"history" is {kind_of(history)}, a list of [question, answer] pairs is expected')
    turns = []
    for number, pair in enumerate(history, start=1):
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
        turn = _turn(item, f"turn {number}", notes)
        if turn.role == "system" and not turn.content.strip():
            continue
        if turn.role == "system" and turns:
            raise UnusableRecord(f"turn {number} is a system turn, which is known only at the start")
        turns.append(turn)
    return shape.name, turns


def _turn(item: Any, where: str, notes: list[str]) -> Turn:
    if not isinstance(item, dict):
        raise UnusableRecord(f'{where} is {kind_of(item)}, {{"role", "content"}} or {{"from", "value"}} is expected')
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if role_key not in item or (text_key not in item and not item.get("tool_calls")):
        seen = ", ".join(_quoted(str(key)) for key in list(item)[:6]) or "nothing"
        raise UnusableRecord(f'{where} has {seen}; "role" and "content", or "from" and "value" are expected')
    name = item[role_key]
    role = _role_of(name)
    if item.get("tool_calls") or item.get("function_call") or name in _TOOL_ROLES:
        raise UnusableRecord(f"{where} is a tool call or its result, which no template here can render")
    if role is None:
        shown = _quoted(name) if type(name) is str else kind_of(name)
        raise UnusableRecord(f"{where} has the {role_key} {shown}; known: {', '.join(ROLES)}")
    content = item[text_key]
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content, where, notes)
    if role == "assistant":
        try:
            learn = is_to_learn(item, notes)
        except ValueError as reason:
            raise UnusableRecord(f"{where} has {reason}") from None
        return Turn("assistant", _answer(content, where, notes).content, learn=learn)
    return _question(content, where, notes) if role == "user" else Turn("system", _optional_text(content, where, notes))


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
            texts.append(_text(part, place, notes))
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in (None, *_TEXT_PARTS):
            what = f"of type {_quoted(kind)}" if isinstance(kind, str) else kind_of(part)
            raise UnusableRecord(f"{place} is {what}; only text can be learned")
        key = next((key for key in _TEXT_KEYS if part.get(key) is not None), None)
        if key is None:
            seen = ", ".join(_quoted(str(key)) for key in list(part)[:6]) or "nothing"
            raise UnusableRecord(f'{place} has no text: its keys are {seen}, and "text" is expected')
        texts.append(_text(part[key], f'{place} "{key}"', notes))
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
    seen = ", ".join(_quoted(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")
    half_found = [shape for shape in _SHAPES if present & set(shape.required)]
    for shape in half_found + [shape for shape in _SHAPES if set(nulls) & set(shape.required)]:
        null = [key for key in shape.required if key in nulls]
        if null:
            return f'"{null[0]}" is null' + ("" if half_found else f"; keys seen: {seen}")
    names = sorted({key for shape in _SHAPES for key in shape.required})
    close = [(key, match) for key in keys for match in get_close_matches(key.lower(), names, 1, 0.75) if match != key]
    hint = "; did you mean " + " and ".join(f'"{m}" for {_quoted(k)}' for k, m in close[:2]) + "?" if close else ""
    if half_found and not hint:
        shape = half_found[0]
        missing = next(key for key in shape.required if key not in present)
        has = next(key for key in shape.required if key in present)
        return f'"{has}" is there, but "{missing}" is missing; keys seen: {seen}'
    known = "; ".join("/".join(shape.required) for shape in _SHAPES)
    return f"unknown shape: keys seen: {seen or 'none'}{hint}; known shapes: {known}"


def _pair(name: str, question: str, answer: str, *optional: str) -> _Shape:
    return _Shape(name, (question, answer), (*optional, "history", "system"), _from_pair)


# Order matters: the fullest form first, so that a `text` or `prompt` beside `messages` is not taken instead of them.
_SHAPES = (
    _Shape("OpenAI messages", ("messages",), ("system",), _from_turns),
    _Shape("ShareGPT conversations", ("conversations",), ("system",), _from_turns),
    _pair("instruction/input/output", "instruction", "output", "input"),
    _pair("instruction/context/response", "instruction", "response", "input", "context"),
    _pair("input/output", "input", "output"),
    _pair("prompt/response", "prompt", "response"),
    _pair("prompt/completion", "prompt", "completion"),
    _pair("question/answer", "question", "answer"),
    _pair("query/response", "query", "response"),
    _Shape("text", ("text",), (), _from_pair),
)
SHAPE_NAMES = tuple(shape.name for shape in _SHAPES)
