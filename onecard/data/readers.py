"""From a file's bytes to raw records, one at a time, each with the line on which a person finds it.

Knows json, jsonl, csv and parquet as files, and what can be broken in them; plain text is read by plain_text.py. Does
not know which keys a record should have (formats.py) nor what the record is for.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from onecard.data.documents import DOCUMENT_SUFFIXES, document_text, page_list
from onecard.data.json_records import JsonValues, RecordDecoder
from onecard.data.plain_text import (
    BOM,
    LONGEST_TEXT,
    MAX_RECORD_BYTES,
    RawRecord,
    TxtSplit,
    bounded_lines,
    not_utf8,
    texts,
    too_long,
)
from onecard.data.values import UnusableRecord

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_PEEK_BYTES = 2**16
_PROBED_VALUES = 5
_PARQUET_ROWS, _AT_ONCE_BYTES = 1024, 2**27
_MOST_RATIO = 1000  # by which a column of data is packed at most
_COLUMNS = {"instruction", "input", "output", "prompt", "response", "completion", "question", "answer", "query"}


def read_file(path: Path, txt_split: TxtSplit = "auto") -> Iterator[RawRecord]:
    """The records of one file, in order, whatever is broken in it. Raises OSError only."""
    suffix = path.suffix.lower()
    if suffix in DOCUMENT_SUFFIXES:
        yield from _document(path)
        return
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as stream:
        head = stream.read(_PEEK_BYTES)
        stream.seek(0)
        problem = _foreign_content(head)
        if problem:
            yield RawRecord(1, problem=problem)
            return
        yield from _text_records(stream, head, suffix, txt_split)


def _document(path: Path) -> Iterator[RawRecord]:
    """A document as one text; one that is too long to be encoded at once in several."""
    try:
        found = document_text(path)
    except UnusableRecord as reason:
        yield RawRecord(1, problem=str(reason))
        return
    note = f"no text on the pages {page_list(found.empty_pages)}" if found.empty_pages else ""
    pieces = [found.text[place : place + LONGEST_TEXT] for place in range(0, len(found.text), LONGEST_TEXT)]
    for nth, piece in enumerate(pieces, start=1):
        yield RawRecord(1, {"text": piece}, nth=nth if len(pieces) > 1 else 0, note=note)


def _text_records(stream: BinaryIO, head: bytes, suffix: str, txt_split: TxtSplit = "auto") -> Iterator[RawRecord]:
    if suffix == ".csv":
        return _csv_rows(stream)
    if suffix == ".txt":
        held = ".json" if _holds_json(stream, head) else ".csv" if _begins_with_columns(head) else ""
        if not held:
            return texts(stream, txt_split)
        note = f"the file is named .txt and holds {held[1:].upper()}: it was read as such, not as text to continue"
        return (record._replace(note=note) for record in _text_records(stream, head, held))
    return _json_lines(stream) if _is_one_value_per_line(head, suffix) else _json_values(stream)


def _foreign_content(head: bytes) -> str:
    """What this file is instead of UTF-8 text, or an empty string."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16; save it as UTF-8"
    if head.startswith(b"\x1f\x8b"):
        return "the file is gzip-compressed; unpack it first"
    if head.startswith(b"PK\x03\x04"):
        return "the file is a zip archive or an office document; unpack it or save it as csv"
    if head.startswith(b"version https://git-lfs"):
        return "the file is only a git-lfs pointer: the data was not downloaded (run `git lfs pull`)"
    return ""


def _holds_json(stream: BinaryIO, head: bytes) -> bool:
    """Whether a text file is JSON: one of its first values is an object with keys. Prose may begin with a bracket."""
    if not head.removeprefix(BOM).lstrip().startswith((b"{", b"[")):
        return False
    found = islice(JsonValues(stream, MAX_RECORD_BYTES), _PROBED_VALUES)
    holds_json = any(isinstance(one.value, dict) and one.value for one in found)
    stream.seek(0)
    return holds_json


def _begins_with_columns(head: bytes) -> bool:
    """Whether a text file is a csv of questions and answers: "instruction,input,output" is no sentence."""
    first = head.removeprefix(BOM).split(b"\n", 1)[0].decode("utf-8", "replace")
    names = [name.strip().strip('"').lower() for name in first.split(",")]
    return len(_COLUMNS.intersection(names)) > 1 and all(name.isidentifier() for name in names)


def _is_one_value_per_line(head: bytes, suffix: str) -> bool:
    """Whether a JSON file is JSON lines, judged by its content: people name these files both ways.

    '{"a": 1}\\n{"a": 2}'  -> True          '[\\n{"a": 1},...'  -> False
    '[1]\\n{"a": 1}'       -> True          '[{"a": 1}]'        -> False
    The '[1]' alone would be a list; the object on the next line shows that it is a broken line among others.
    """
    head = head.removeprefix(BOM).lstrip()
    first, newline, rest = head.partition(b"\n")
    first = first.strip()
    whole = bool(newline) and RecordDecoder().is_whole(first.rstrip(b","))
    if first.startswith(b"["):
        return whole and rest.lstrip().startswith((b"{", b"["))
    if suffix == ".jsonl":
        return first != b"{"
    return whole


def _json_lines(stream: BinaryIO) -> Iterator[RawRecord]:
    decoder = RecordDecoder()
    for number, line in bounded_lines(stream):
        if line is None:
            yield RawRecord(number, problem=f"the line is {too_long()}")
            continue
        # Files joined with `cat` have byte order marks in the middle too.
        line = line.removeprefix(BOM).strip()
        if not line:
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield RawRecord(number, problem=not_utf8(error))
            continue
        note = ""
        if text.endswith(","):
            text, note = text[:-1], "a comma after the record was ignored"
        value, problem = decoder.line(text)
        yield RawRecord(number, value, problem, note="" if problem else note)


def _json_values(stream: BinaryIO) -> Iterator[RawRecord]:
    """The elements of a JSON list, or JSON objects that follow one another over several lines each."""
    previous_line = 0
    for nth, found in enumerate(JsonValues(stream, MAX_RECORD_BYTES), start=1):
        yield RawRecord(found.line, found.value, found.problem, nth if found.line == previous_line else 0)
        previous_line = found.line


def _csv_rows(stream: BinaryIO) -> Iterator[RawRecord]:
    # surrogateescape: a wrong byte spoils its own row, not the file.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # strict: without it a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(text, strict=True)
    # The limit belongs to the whole process, so it is given back.
    previous_limit = csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        yield from _csv_records(reader)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_records(reader: Any) -> Iterator[RawRecord]:
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        row, problem = _next_csv_row(reader, line)
        if row is None and not problem:
            return
        if row and not header:
            problem = _header_problem(row)
            if problem:
                yield RawRecord(line, problem=problem)
                return
            header, row = row, None
        if problem:
            yield RawRecord(line, problem=problem if header else f"{problem}; this is the header, no row is used")
            if not header:
                return
        if row:
            yield _csv_record(line, header, row)


def _next_csv_row(reader: Any, line: int) -> tuple[list[str] | None, str]:
    """(row, "") or (None, reason); (None, "") at the end of the file."""
    try:
        return next(reader), ""
    except StopIteration:
        return None, ""
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None, (
                f"broken csv: a quote opened in this row is never closed; "
                f"lines {line} to {reader.line_num} were read as one field and are not used"
            )
        return None, f"broken csv: {error}"


def _header_problem(header: list[str]) -> str:
    """Why no row of the file can be read under this header, or an empty string."""
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        return f"the header names the column {repeated[0]!r} twice; no row of this file is used"
    return ""


def _csv_record(line: int, header: list[str], row: list[str]) -> RawRecord:
    if len(row) != len(header):
        return RawRecord(line, problem=f"the row has {len(row)} fields, the header has {len(header)}")
    for name, field in zip(header, row, strict=True):
        escaped = re.search("[\udc80-\udcff]", field)
        if escaped:
            byte = ord(escaped.group()) - 0xDC00
            return RawRecord(line, problem=f"not valid UTF-8: byte 0x{byte:02x} in the column {name!r}")
    # A line end inside a field is as the file's system writes it; what is learned must not depend on that.
    return RawRecord(line, {name: field.replace("\r\n", "\n") for name, field in zip(header, row, strict=True)})


def _parquet_rows(path: Path) -> Iterator[RawRecord]:
    import pyarrow as pa  # heavy, and only for this format
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_rows_at_once(file.metadata))
            for row, value in enumerate(chain.from_iterable(map(_values, batches)), start=1):
                yield RawRecord(row, value, problem="" if value is not None else too_long())
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield RawRecord(row + 1, problem=f"the file cannot be read as parquet from row {row + 1} on: {reason}")


def _rows_at_once(metadata: Any) -> int:
    """Rows to read together: a value may be as long as all distinct ones of its column, and stand in every row.

    Raises ValueError for a column that unpacks to far more than data do.
    """
    longest = 1
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            unpacked, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if unpacked > _AT_ONCE_BYTES and unpacked > _MOST_RATIO * packed:
                raise ValueError(f"{column.path_in_schema} unpacks to {unpacked // packed:,} times its size")
            longest = max(longest, unpacked if column.has_dictionary_page else 1)
    return max(1, min(_PARQUET_ROWS, _AT_ONCE_BYTES // longest))


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None in place of one that is too long for a record."""
    if batch.nbytes <= MAX_RECORD_BYTES:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    single = (batch.slice(place, 1) for place in range(len(batch)))
    return [None if sum(map(_decoded_bytes, each.columns)) > MAX_RECORD_BYTES else each.to_pylist()[0]
            for each in single]  # fmt: skip


def _decoded_bytes(column: Any) -> int:
    """Of a column of one row, which otherwise counts every value that its dictionary has."""
    return int((column.dictionary_decode() if hasattr(column, "dictionary") else column).nbytes)
