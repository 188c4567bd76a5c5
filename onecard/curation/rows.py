"""Records of any source as rows that can be written again: every field kept, with the sample that is in them.

Knows sources and shapes. Does not know what makes a row worth keeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from onecard.data.columns import Columns
from onecard.data.formats import ParsedRecord, to_sample
from onecard.data.json_records import as_json
from onecard.data.messages import Conversation, Document
from onecard.data.sources import ReadReport, Source, raw_records
from onecard.data.values import UnusableRecord, kind_of

Shaper = Callable[[Any, str, Columns], ParsedRecord]


class RecordPlace(NamedTuple):
    """Where a record begins: file, line (for parquet and the Hub: row), and its number among several on one line."""

    file: str
    line: int
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}#{self.nth}" if self.nth else f"{self.file}:{self.line}"


@dataclass(slots=True)
class RecordRow:
    """A record with its place; `sample` is None where it cannot be learned from, and `problem` says why."""

    place: RecordPlace
    value: Any
    sample: Conversation | Document | None
    problem: str = ""
    was_changed: bool = False

    def line(self) -> str:
        """The record as a line of JSON, without the line break."""
        return as_json(self.value)


def read_rows(
    source: Source,
    report: ReadReport,
    repair: Callable[[str], str] | None = None,
    shape: Shaper = to_sample,
) -> Iterator[RecordRow]:
    """Every record of a source in order, unusable ones too. `repair` is given each text in a record, at any depth.

    Raises DataError: nothing there, or a file that cannot be read.
    """
    for file, raw in raw_records(source, report):
        row = RecordRow(RecordPlace(file, raw.line, raw.nth), raw.value, None, raw.problem)
        if not raw.problem:
            if repair is not None:
                row.value, row.was_changed = _repaired(raw.value, repair)
            _shape(row, source.columns, shape)
        yield row


def _shape(row: RecordRow, columns: Columns, shape: Shaper) -> None:
    try:
        row.sample = shape(row.value, str(row.place), columns).sample
        row.line()
    except UnusableRecord as reason:
        row.sample, row.problem = None, str(reason)
    except TypeError:
        row.sample, row.problem = None, f"a field holds {_foreign(row.value)}, which JSON cannot hold"


def _foreign(value: Any) -> str:
    """The first value of no JSON type, in words."""
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for found in map(_foreign, inner) if found), "")
    return "" if value is None or isinstance(value, (str, int, float)) else kind_of(value)


def _repaired(value: Any, repair: Callable[[str], str]) -> tuple[Any, bool]:
    if type(value) is str:  # no number as it was written
        text = repair(value)
        return text, text != value
    if isinstance(value, dict):
        pairs = {key: _repaired(item, repair) for key, item in value.items()}
        return {key: new for key, (new, _) in pairs.items()}, any(changed for _, changed in pairs.values())
    if isinstance(value, (list, tuple)):
        items = [_repaired(item, repair) for item in value]
        return [new for new, _ in items], any(changed for _, changed in items)
    return value, False
