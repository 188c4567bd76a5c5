"""Information extraction as instructions, and back: entities, relations and events of a text, under a schema.

Rows have the form of IEPile (https://arxiv.org/abs/2402.14710): the instruction is JSON with "instruction", "schema"
and "input", the output JSON with a list for each type. Rows of InstructIE (https://arxiv.org/abs/2305.11527) are read,
too.

    entities    {"person": ["Ada"]}                                                  schema ["person", ...]
    relations   {"born in": [{"subject": "Ada", "object": "London"}]}                schema ["born in", ...]
    events      {"marriage": [{"trigger": "wed", "arguments": {"who": "Ada"}}]}
                schema [{"event_type": "marriage", "trigger": true, "arguments": ["who", ...]}, ...]

Knows JSON and wordings. Does not know files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from onecard.data.values import UnusableRecord, kind_of, safe
from onecard.data.wordings import language_of, wordings

ExtractionKind = Literal["entities", "relations", "events"]
Extracted = dict[str, list[Any]]

# IEPile's names of tasks, and how many types it puts into one instruction.
_TASKS: dict[ExtractionKind, str] = {"entities": "NER", "relations": "RE", "events": "EE"}
_TYPES_PER_ROW: dict[ExtractionKind, int] = {"entities": 6, "relations": 4, "events": 4}
_UNTOLD = "NAN"


@dataclass(frozen=True)
class EventType:
    """A type of event: its name, the roles of its arguments, and whether its trigger is asked for."""

    name: str
    arguments: tuple[str, ...] = ()
    trigger: bool = True


@dataclass(frozen=True)
class ExtractionSchema:
    """What is looked for: names of entities or relations, or types of events, in order."""

    kind: ExtractionKind
    types: tuple[str | EventType, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item if isinstance(item, str) else item.name for item in self.types)

    def plain(self) -> list[Any]:
        """The schema as it stands in an instruction."""
        return [
            item
            if isinstance(item, str)
            else {"event_type": item.name, "trigger": item.trigger, "arguments": list(item.arguments)}
            for item in self.types
        ]


@dataclass(frozen=True)
class ExtractionRow:
    """A text, the schema, and what is in the text; `found` has each type of the schema, in its order."""

    schema: ExtractionSchema
    text: str
    found: Extracted


def to_row(row: ExtractionRow) -> dict[str, str]:
    """The row as an instruction and its output, in the language of the text. Raises UnusableRecord."""
    wording = wordings()[language_of(row.text)][row.schema.kind]
    asked = {"instruction": wording, "schema": row.schema.plain(), "input": row.text}
    found = checked(row.schema, row.found)
    if row.schema.kind == "events":
        found = {name: [_with_untold(event, row.schema, name) for event in events] for name, events in found.items()}
    return {
        "task": _TASKS[row.schema.kind],
        "instruction": json.dumps(asked, ensure_ascii=False),
        "output": json.dumps(found, ensure_ascii=False),
    }


def to_rows(row: ExtractionRow, types_per_row: int = 0) -> Iterator[dict[str, str]]:
    """The row in several, each with some of the types, as IEPile has them; 0: its own counts (6 entities, 4 others)."""
    step = types_per_row or _TYPES_PER_ROW[row.schema.kind]
    for start in range(0, len(row.schema.types), step):
        part = ExtractionSchema(row.schema.kind, row.schema.types[start : start + step])
        yield to_row(ExtractionRow(part, row.text, {name: row.found.get(name, []) for name in part.names}))


def from_row(row: dict[str, Any]) -> ExtractionRow:
    """The way back from an instruction and its output. Raises UnusableRecord."""
    try:
        asked = json.loads(row["instruction"])
        schema, text = asked["schema"], asked["input"]
    except (KeyError, TypeError, ValueError) as reason:
        raise UnusableRecord(f"the instruction is no JSON with a schema and an input ({reason})") from None
    if not isinstance(text, str) or not isinstance(schema, list) or not schema:
        raise UnusableRecord(
            f"the input is {kind_of(text)} and the schema {kind_of(schema)}; a text and a list expected"
        )
    read = read_schema(schema, str(row.get("task") or ""), row.get("output"))
    return ExtractionRow(read, text, read_answer(read, row.get("output")))


def read_schema(schema: list[Any], task: str = "", output: Any = None) -> ExtractionSchema:
    """A schema as it stands in an instruction; names alone are of entities or of relations, by the task or the output.

    Raises UnusableRecord.
    """
    if all(isinstance(item, dict) and isinstance(item.get("event_type"), str) for item in schema):
        events = tuple(
            EventType(
                item["event_type"], tuple(map(str, item.get("arguments") or ())), item.get("trigger") is not False
            )
            for item in schema
        )
        return ExtractionSchema("events", events)
    if not all(isinstance(item, str) and item for item in schema):
        raise UnusableRecord("the schema holds neither names nor types of events alone")
    is_relations = task == "RE" if task in _TASKS.values() else '"subject"' in str(output)
    return ExtractionSchema("relations" if is_relations else "entities", tuple(schema))


def read_answer(schema: ExtractionSchema, answer: Any) -> Extracted:
    """What an answer found: JSON, alone or among other words; types that the schema has not are left out.

    Raises UnusableRecord: no JSON object, or a value of another form.
    """
    if isinstance(answer, str):
        start = answer.find("{")
        try:
            answer, _ = json.JSONDecoder().raw_decode(answer, max(start, 0))
        except (ValueError, RecursionError):
            raise UnusableRecord(f"the answer holds no whole JSON object: {safe(answer, 60)}") from None
    if not isinstance(answer, dict):
        raise UnusableRecord(f"the answer is {kind_of(answer)}, an object is expected")
    return checked(schema, {name: answer.get(name) or [] for name in schema.names})


def checked(schema: ExtractionSchema, found: Extracted) -> Extracted:
    """The same in the order of the schema, each value of the right form. Raises UnusableRecord."""
    if foreign := [name for name in found if name not in schema.names]:
        raise UnusableRecord(f"{safe(foreign[0])!r} is not in the schema")
    ordered: Extracted = {}
    for item in schema.types:
        name = item if isinstance(item, str) else item.name
        values = found.get(name, [])
        if not isinstance(values, list):
            raise UnusableRecord(f"{safe(name)!r} is {kind_of(values)}, a list is expected")
        ordered[name] = [_value(schema.kind, item, value) for value in values]
    return ordered


def _value(kind: ExtractionKind, item: str | EventType, value: Any) -> Any:
    if kind == "entities":
        if isinstance(value, str):
            return value
    elif isinstance(value, dict):
        if kind == "relations" and isinstance(value.get("subject"), str) and isinstance(value.get("object"), str):
            return {"subject": value["subject"], "object": value["object"]}
        if isinstance(item, EventType) and isinstance(value.get("arguments", {}), dict):
            return _event(item, value)
    raise UnusableRecord(f"one of the {kind} is {safe(json.dumps(value, ensure_ascii=False, default=str))}")


def _event(kind: EventType, value: dict[str, Any]) -> dict[str, Any]:
    """An event with its told arguments in the order of its type; one that has several stays a list."""
    arguments = {
        role: text
        for role in kind.arguments
        if (text := value.get("arguments", {}).get(role)) not in (None, "", _UNTOLD, [])
    }
    trigger = value.get("trigger")
    with_trigger = kind.trigger and isinstance(trigger, str) and trigger not in ("", _UNTOLD)
    return {**({"trigger": trigger} if with_trigger else {}), "arguments": arguments}


def _with_untold(event: dict[str, Any], schema: ExtractionSchema, name: str) -> dict[str, Any]:
    """The event with NAN for what is not told, as it is learned."""
    kind = next(item for item in schema.types if isinstance(item, EventType) and item.name == name)
    trigger = {"trigger": event.get("trigger", _UNTOLD)} if kind.trigger else {}
    return {**trigger, "arguments": {role: event["arguments"].get(role, _UNTOLD) for role in kind.arguments}}


def from_instructie(row: dict[str, Any], types: tuple[str, ...] = ()) -> ExtractionRow:
    """A row of InstructIE: {"text" or "input": ..., "relation": [{"head", "relation", "tail", ...}]}.

    types: the relations of its schema; without them those that the row has. Raises UnusableRecord.
    """
    text, relations = row.get("text") or row.get("input"), row.get("relation")
    if not isinstance(text, str) or not isinstance(relations, list):
        raise UnusableRecord('no row of InstructIE: "text" or "input", and a list "relation" are expected')
    found: Extracted = {name: [] for name in types}
    for item in relations:
        parts = [item.get(key) for key in ("head", "relation", "tail")] if isinstance(item, dict) else [None]
        if not all(isinstance(part, str) and part for part in parts):
            raise UnusableRecord(f"a relation is {safe(json.dumps(item, ensure_ascii=False, default=str))}")
        head, name, tail = parts
        if not types or name in types:
            found.setdefault(str(name), []).append({"subject": head, "object": tail})
    if not found:
        raise UnusableRecord("the row has no relation, and no schema was given")
    return ExtractionRow(ExtractionSchema("relations", tuple(found)), text, found)
