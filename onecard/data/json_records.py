"""JSON values read one at a time from a stream of any size, each with the line on which it begins.

Knows JSON text and what goes wrong in it: a value broken in the middle costs that value, not the file. Does not know
what the values mean. Numbers stay as they were written ("1.50" stays "1.50"), because here they become text to learn.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

_CHUNK_BYTES = 2**20
_BETWEEN_VALUES = re.compile(r"[ \t\r\n,\ufeff]*")
_FIRST_KEY = re.compile(r'\{\s*"[^"\\]{1,100}"\s*:')
# What the error handler "surrogateescape" makes of a byte that is not UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_HALF = re.compile("[\ud800-\udfff]")
# A value cut by the end of the buffer fails at most this many characters before it: a literal or an escape.
_LONGEST_TOKEN = 16


class NumberText(str):
    """A JSON number, as its digits were written."""

    __slots__ = ()


def as_json(value: Any) -> str:
    """One line of JSON for a value as it was read: numbers as they were written. Raises TypeError: no JSON type.

    What is not UTF-8 (half of a character) is written as an escape.
    """
    if isinstance(value, NumberText):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(str(key))}: {as_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_json, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(value)


def plain_value(value: Any) -> Any:
    """Values of a record as JSON has them: numbers that were kept as text become numbers again, NaN becomes null."""
    if isinstance(value, NumberText):
        return plain_value(json.loads(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain_value(item) for item in value]
    return str(value)


class RecordDecoder:
    """A JSON decoder that keeps numbers as written and notices duplicate keys."""

    def __init__(self) -> None:
        self._duplicate_key: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=NumberText, parse_int=NumberText, parse_constant=float
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            self._duplicate_key = next(name for name in names if names.count(name) > 1)
        return fields

    def at(self, text: str, start: int) -> tuple[Any, int, str]:
        """(value, end, problem) of the value that begins at `start`.

        Raises json.JSONDecodeError where there is no whole value, RecursionError where it is nested too deep.
        """
        self._duplicate_key = None
        value, end = self._decoder.raw_decode(text, start)
        if self._duplicate_key is not None:
            return None, end, f"the key {json.dumps(self._duplicate_key[:80])} appears twice in one object"
        return value, end, ""

    def line(self, text: str) -> tuple[Any, str]:
        """(value, problem) of a line that must hold one value; no blanks around it."""
        try:
            value, end, problem = self.at(text, 0)
        except json.JSONDecodeError as error:
            return None, f"broken JSON at column {error.pos + 1}: {error.msg}"
        except RecursionError:
            return None, "the JSON is nested too deep"
        if end != len(text):
            return None, f"broken JSON at column {end + 1}: more text after the end of the value"
        return value, problem

    def is_whole(self, line: bytes) -> bool:
        """Whether these bytes are one JSON value and nothing more."""
        try:
            text = line.decode("utf-8")
            return self.at(text, 0)[1] == len(text)
        except (ValueError, RecursionError):
            return False


class FoundValue(NamedTuple):
    """A value and the line where it begins, or the reason why it cannot be read."""

    line: int
    value: Any = None
    problem: str = ""


class JsonValues:
    """Iterates over the elements of one JSON list, or over values that follow one another.

    b'[{"a": 1},\\n {"a": 2,},\\n {"a": 3}'  gives a value at line 1, a problem at line 2 (comma), a value at line 3,
    and a problem for the list that is never closed. Keeps one value and one chunk in memory.
    """

    def __init__(self, stream: BinaryIO, max_chars: int) -> None:
        self._stream = stream
        self._max_chars = max_chars
        self._decoder = RecordDecoder()
        # surrogateescape: a wrong byte spoils its own value, not the file.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._has_wrong_bytes = False
        self._text = ""
        # The next character to read, and where it stands in the file.
        self._start = 0
        self._line = 1
        self._column = 1
        self._ended = False

    def __iter__(self) -> Iterator[FoundValue]:
        self._skip_between()
        in_list = self._peek() == "["
        if in_list:
            self._advance(self._start + 1)
        first_indent = None if in_list else ""
        while True:
            indent = self._skip_between()
            character = self._peek()
            if not character:
                if in_list:
                    yield FoundValue(self._line, problem="the list is not closed: the file may be cut off here")
                return
            if in_list and character == "]":
                self._advance(self._start + 1)
                yield from self._after_list()
                return
            found, goes_on = self._next_value(first_indent if indent is None else indent)
            yield found
            in_list, first_indent = in_list and goes_on, None

    def _after_list(self) -> Iterator[FoundValue]:
        self._skip_between()
        if self._peek():
            yield FoundValue(self._line, problem="text after the end of the list; nothing from here on is used")

    def _next_value(self, indent: str | None) -> tuple[FoundValue, bool]:
        """The value at the current position, and whether the end of the list is still to come."""
        while True:
            line = self._line
            try:
                value, end, problem = self._decoder.at(self._text, self._start)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._more_within_limit():
                    continue
                problem = self._describe(error)
            except RecursionError:
                problem = "the JSON is nested too deep"
            else:
                # A number that ends with the buffer may go on in the next chunk.
                if end == len(self._text) and self._more_within_limit():
                    continue
                problem = problem or self._wrong_byte(self._start, end)
                self._advance(end)
                return FoundValue(line, None if problem else value, problem), True
            return FoundValue(line, problem=problem), self._go_to_next_value(indent)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_TOKEN

    def _more_within_limit(self) -> bool:
        return len(self._text) - self._start <= self._max_chars and self._read_more()

    def _describe(self, error: json.JSONDecodeError) -> str:
        if len(self._text) - self._start > self._max_chars and self._may_be_cut(error):
            return f"a record longer than {self._max_chars / 2**20:g} MiB"
        wrong_byte = self._wrong_byte(self._start, min(error.pos + 1, len(self._text)))
        if wrong_byte:
            return wrong_byte
        line, column = self._place(error.pos)
        cut = self._ended and (error.msg.startswith("Unterminated") or error.pos >= len(self._text.rstrip()))
        where = f"broken JSON at line {line} column {column}: {error.msg}"
        return f"{where} (the file ends inside this record: was it cut off?)" if cut else where

    def _wrong_byte(self, start: int, end: int) -> str:
        """The first byte in text[start:end] that was not UTF-8, named; or an empty string."""
        if not self._has_wrong_bytes:
            return ""
        found = _ESCAPED_BYTE.search(self._text, start, end)
        if not found:
            return ""
        line, column = self._place(found.start())
        return f"not valid UTF-8: byte 0x{ord(found.group()) - 0xDC00:02x} at line {line} column {column}"

    def _go_to_next_value(self, indent: str | None) -> bool:
        """Skip a broken value; False when the file ended before another began.

        Files have a habit: records begin on lines of their own at one indentation, or follow one another with the
        same first key. Brackets cannot be counted here, because a lost quote is what is usually wrong.
        """
        first_key = _FIRST_KEY.match(self._text, self._start)
        if indent is not None:
            # Without indentation a key at the start of a line looks like a text record, so none is taken for one.
            not_a_start = r"\s\]}," if indent else r"\s\]},\""
            border = re.compile("\n" + re.escape(indent) + f"(?=[^{not_a_start}])")
        elif first_key:
            border = re.compile(re.escape(first_key.group()))
        else:
            border = re.compile(r"[,\s](?=\{)")
        self._advance(self._start + 1)
        while True:
            found = border.search(self._text, self._start)
            if found:
                self._advance(found.start())
                return True
            # Keep what may be the first half of a border.
            self._advance(max(self._start, len(self._text) - 512))
            if not self._read_more():
                self._advance(len(self._text))
                return False

    def _skip_between(self) -> str | None:
        """Skip blanks and commas; the indentation when a line begins here, None in the middle of a line."""
        while True:
            found = _BETWEEN_VALUES.match(self._text, self._start)
            assert found is not None  # the pattern matches the empty string too
            if found.end() < len(self._text) or not self._read_more():
                break
        self._advance(found.end())
        _, newline, indent = found.group().rpartition("\n")
        return indent if newline and "," not in indent else None

    def _peek(self) -> str:
        return self._text[self._start : self._start + 1]

    def _place(self, position: int) -> tuple[int, int]:
        """(line, column) in the file of a position at or after the start."""
        line_break = self._text.rfind("\n", self._start, position)
        if line_break < 0:
            return self._line, self._column + position - self._start
        return self._line + self._text.count("\n", self._start, position), position - line_break

    def _advance(self, end: int) -> None:
        self._line, self._column = self._place(end)
        self._start = end

    def _read_more(self) -> bool:
        """Append a chunk, as large again as what is held, so that a long value is not rescanned too often."""
        if self._ended:
            return False
        rest = self._text[self._start :]
        chunk = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._ended = not chunk
        decoded = self._utf8.decode(chunk, final=self._ended)
        if self._ended and not decoded:
            return False
        if not self._has_wrong_bytes and not decoded.isascii():
            self._has_wrong_bytes = _ESCAPED_BYTE.search(decoded) is not None
        self._text = rest + decoded
        self._start = 0
        return True
