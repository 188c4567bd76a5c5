"""Information extraction: precision, recall and F1 of entities, relations and events, strict and with relaxed borders.

An answer is JSON under the schema, or tuples: (type, text) for entities, (subject, relation, object), and
(event, role, text), where the role of a trigger is trigger. What is found counts once however often it is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from onecard.data.extraction import (
    EventType,
    Extracted,
    ExtractionRow,
    ExtractionSchema,
    from_instructie,
    from_row,
    read_answer,
    to_row,
)
from onecard.data.messages import Turn
from onecard.data.values import UnusableRecord
from onecard.errors import DataError
from onecard.evaluate.measures import Measure
from onecard.evaluate.open_answers import greedy, notes_on, records_of
from onecard.inference.call import ModelBundle
from onecard.storage import sha256_of

TRIGGER = "trigger"
_TUPLE = re.compile(r"[(（\[【<]([^()（）\[\]【】<>]+)[)）\]】>]")
_BETWEEN = re.compile(r"\s*[,，;；、|]\s*")


class ExtractedItem(NamedTuple):
    """What is compared: a type (of an event with its role) and one or two texts."""

    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ExtractionItem:
    """A row of the file: the instruction as the model gets it, the schema, and what is to be found."""

    key: str
    instruction: str
    row: ExtractionRow


class ExtractionTask:
    """Rows of IEPile's or InstructIE's form, asked in the model's template."""

    kind = "extraction"

    def __init__(self, path: Path, *, max_new_tokens: int = 512, limit: int = 0) -> None:
        self.name = f"extraction/{path.name}"
        self._path, self._max_new_tokens = path, max_new_tokens
        self.items: list[ExtractionItem] = []
        for number, (line, record) in enumerate(records_of(path), start=1):
            if limit and number > limit:
                break
            try:
                row = from_row(record) if "instruction" in record else from_instructie(record)
                instruction = str(record["instruction"]) if "instruction" in record else to_row(row)["instruction"]
            except UnusableRecord as reason:
                raise DataError(str(reason), str(path), line) from None
            self.items.append(ExtractionItem(str(number), instruction, row))
        if not self.items:
            raise DataError("holds no row", str(path))

    def depends_on(self) -> dict[str, Any]:
        """What the answers depend on, besides the model."""
        return {"digest": sha256_of(self._path), "max_new_tokens": self._max_new_tokens}

    def work(self, bundle: ModelBundle, items: Sequence[ExtractionItem]) -> list[dict[str, Any]]:
        """The greedy answer to each row, with its strict F1, by which evaluations are compared."""
        asked = [(Turn("user", item.instruction),) for item in items]
        rows = []
        for item, one in zip(items, greedy(bundle, asked, self._max_new_tokens), strict=True):
            counts = _Counts()
            found = parsed_answer(item.row.schema, one["answer"])
            counts.add(items_of(item.row.found), items_of(found or {}))
            rows.append({"key": item.key, **one, "f1": counts.f1("strict")})
        return rows

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Strict and relaxed figures in total and by type, the rows that could not be read; the worst rows first."""
        items = {item.key: item for item in self.items}
        counts: dict[str, _Counts] = {"": _Counts()}
        worst, unparsed = [], 0
        for row in rows:
            item = items[row["key"]]
            found = parsed_answer(item.row.schema, row["answer"])
            unparsed += found is None
            wanted, got = items_of(item.row.found), items_of(found or {})
            for name in ("", *item.row.schema.names):
                part = [
                    [one for one in side if not name or one.kind.partition("/")[0] == name] for side in (wanted, got)
                ]
                counts.setdefault(name, _Counts()).add(*part)
            own = _Counts()
            own.add(wanted, got)
            if own.strict < max(own.wanted, own.got):
                worst.append((own.f1("strict"), row, item))
        measures = [
            Measure("type" if name else "total", name, c.wanted, c.values())
            for name, c in counts.items()
            if not name or c.wanted or c.got
        ]
        measures[0].n = len(rows)
        measures[0].values["unparsed"] = unparsed
        return {
            "settings": {"path": self._path.name, "max_new_tokens": self._max_new_tokens},
            "measures": [measure.plain() for measure in measures],
            "worst": [
                {"key": row["key"], "question": item.row.text, "expected": to_row(item.row)["output"],
                 "got": row["answer"] or row.get("problem", "")}
                for _, row, item in sorted(worst, key=lambda one: (one[0], int(one[1]["key"])))
            ],
            "notes": notes_on(rows),
        }  # fmt: skip


@dataclass
class _Counts:
    """What was wanted and got, and how much of it agrees."""

    wanted: int = 0
    got: int = 0
    strict: int = 0
    relaxed: int = 0

    def add(self, wanted: Sequence[ExtractedItem], got: Sequence[ExtractedItem]) -> None:
        self.wanted += len(wanted)
        self.got += len(got)
        self.strict += len(set(wanted) & set(got))
        self.relaxed += n_matched(wanted, got)

    def f1(self, name: str) -> float:
        return 2 * getattr(self, name) / (self.wanted + self.got) if self.wanted + self.got else 1.0

    def values(self) -> dict[str, Any]:
        values = {}
        for name, start in (("strict", ""), ("relaxed", "relaxed_")):
            n = getattr(self, name)
            values[f"{start}precision"] = n / self.got if self.got else float(not self.wanted)
            values[f"{start}recall"] = n / self.wanted if self.wanted else float(not self.got)
            values[f"{start}f1"] = self.f1(name)
        return values


def n_matched(wanted: Sequence[ExtractedItem], got: Sequence[ExtractedItem]) -> int:
    """The most pairs of the same type in which each text holds the other's or is held by it, each item in one pair.

    Augmenting paths (Kuhn), so that no order of the answers loses a pair.
    """
    near = [[k for k, other in enumerate(got) if _is_near(one, other)] for one in wanted]
    partner: dict[int, int] = {}

    def take(one: int, tried: set[int]) -> bool:
        for k in near[one]:
            if k not in tried:
                tried.add(k)
                if k not in partner or take(partner[k], tried):
                    partner[k] = one
                    return True
        return False

    return sum(take(one, set()) for one in range(len(wanted)))


def _is_near(one: ExtractedItem, other: ExtractedItem) -> bool:
    if one.kind != other.kind or len(one.texts) != len(other.texts):
        return False
    return all(a in b or b in a for a, b in zip(one.texts, other.texts, strict=True))


def items_of(found: Extracted) -> list[ExtractedItem]:
    """What was extracted, each once, in order; texts without blanks around them, empty ones left out."""
    items = [item for name, values in found.items() for value in values for item in _items_in(name, value)]
    return [one for one in dict.fromkeys(items) if all(one.texts)]


def _items_in(name: str, value: Any) -> list[ExtractedItem]:
    """One entity, one relation, or the trigger and the arguments of one event."""
    if isinstance(value, str):
        return [ExtractedItem(name, (value.strip(),))]
    if "subject" in value:
        return [ExtractedItem(name, (value["subject"].strip(), value["object"].strip()))]
    by_role = {TRIGGER: value.get("trigger"), **value.get("arguments", {})}
    pairs = [(role, one) for role, texts in by_role.items() for one in (texts if isinstance(texts, list) else [texts])]
    return [ExtractedItem(f"{name}/{role}", (str(text or "").strip(),)) for role, text in pairs]


def parsed_answer(schema: ExtractionSchema, answer: str) -> Extracted | None:
    """What an answer found, from JSON or else from tuples; None where it is neither."""
    try:
        return read_answer(schema, answer)
    except UnusableRecord:
        pass
    parts = [_BETWEEN.split(match.strip()) for match in _TUPLE.findall(answer)]
    found: Extracted = {name: [] for name in schema.names}
    n_read = sum(_take_tuple(schema, [part.strip(" \"'“”") for part in each], found) for each in parts)
    return found if n_read else None


def _take_tuple(schema: ExtractionSchema, parts: list[str], found: Extracted) -> bool:
    """Whether these parts name a type of the schema; then they are put into `found`."""
    name = next((part for part in parts if part in schema.names), None)
    if name is None or len(parts) != (2 if schema.kind == "entities" else 3):
        return False
    rest = list(parts)
    rest.remove(name)
    if schema.kind == "entities":
        found[name].append(rest[0])
    elif schema.kind == "relations":
        found[name].append({"subject": rest[0], "object": rest[1]})
    else:
        kind = next(item for item in schema.types if isinstance(item, EventType) and item.name == name)
        role, text = rest
        if role in (TRIGGER, "触发词"):
            found[name].append({"trigger": text, "arguments": {}})
        elif role in kind.arguments:
            found[name].append({"arguments": {role: text}})
        else:
            return False
    return True
