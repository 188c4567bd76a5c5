"""Questions to be answered, out of any record that training could learn from, with or without an answer in it.

The last answer of a record is what is asked for: where one stands it is put aside, where none stands (or an empty
one) the record is as good. So every shape, role name and reason for a bad record is that of `formats.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onecard.data.columns import TURN_LISTS, Columns, pair_of, renamed
from onecard.data.formats import ANSWERS, ParsedRecord, to_sample
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.preference import chosen_side
from onecard.data.sources import ReadReport, Source, read
from onecard.data.turn_objects import role_of

# Stands where the answer will be while the record is shaped, and is taken away again.
_STAND_IN = "?"


@dataclass(frozen=True, slots=True)
class Question(Conversation):
    """Turns that end with the user's; `fields` is the record as it was read."""

    fields: dict[str, Any] = field(default_factory=dict)


def read_questions(source: str | Source, *, report: ReadReport) -> Iterator[Question]:
    """The questions of a source, one by one; see `sources.read`. Raises DataError."""
    for sample in read(source, report=report, shape=to_question):
        assert isinstance(sample, Question)  # `to_question` makes nothing else
        yield sample


def to_question(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
    """The question in one parsed record; `columns`: other names of its fields. Raises UnusableRecord.

    {"instruction": "Add", "input": "2 3"}                       -> user "Add" with input "2 3"
    {"messages": [user "Hi", assistant "Hello", user "Bye"]}     -> all three turns
    {"messages": [user "Hi", assistant "Hello"]}                 -> user "Hi"
    {"text": "Once"}                                             -> user "Once"
    """
    asked = _with_answer(chosen_side(renamed(value, columns), ANSWERS)) if isinstance(value, dict) else value
    shaped = to_sample(asked, record)
    sample = shaped.sample
    turns = (Turn("user", sample.text),) if isinstance(sample, Document) else sample.turns[:-1]
    return ParsedRecord(Question(turns, record, fields=value), shaped.shape, shaped.notes)


def _with_answer(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the stand-in where its last answer belongs."""
    for key in TURN_LISTS:
        turns = record.get(key)
        if isinstance(turns, (list, tuple)) and turns:
            return {**record, key: [*_asked(turns), {"role": "assistant", "content": _STAND_IN}]}
    for question, answers in ANSWERS.items():
        if record.get(question) is None:
            continue
        key = next((name for name in answers if record.get(name) is not None), answers[0])
        return {**record, key: _answer_like(record.get("input"), record.get(key))}
    return record


def _asked(turns: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The turns up to the last question."""
    keys = pair_of(turns[-1])
    if keys is not None:
        return [*turns[:-1], {"role": "user", "content": turns[-1][keys[0]]}]
    return list(turns[:-1] if role_of(turns[-1]) == "assistant" else turns)


def _answer_like(questions: Any, answers: Any) -> Any:
    """A text, or for lists of turns a list: questions [a, b], answers [x] or [x, y] -> [x, "?"]."""
    if not isinstance(questions, (list, tuple)):
        return _STAND_IN
    before = list(answers) if isinstance(answers, (list, tuple)) else []
    return [*(before[:-1] if len(before) == len(questions) else before), _STAND_IN]
