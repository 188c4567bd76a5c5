"""Plain text files, cut into texts: at blank lines, at every line, or not at all.

Knows lines and bytes, and what a raw record is. Does not know what a text is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

# uncut: at blank lines, however long a text becomes; the way of versions that knew no other.
TxtSplit = Literal["auto", "line", "paragraph", "file", "uncut"]

# Longer than any record worth learning from; a line without an end must not fill the memory.
MAX_RECORD_BYTES = 64 * 2**20
# Tokenising takes some hundred bytes of memory per byte, and --cutoff_len cuts much shorter anyway.
LONGEST_TEXT = 2**20
BOM = b"\xef\xbb\xbf"
_PEEK_BYTES = 2**20
# With blank lines rarer than this they do not separate the texts: somebody left a few among lines.
_LINES_PER_BLANK = 50

ONE_A_LINE = "one text per line, as (almost) no blank lines were seen; --txt_split paragraph or file reads it otherwise"
AT_BLANK_LINES = "blank lines separate the texts; --txt_split line makes every line a text, file the whole file one"
CUT = f"a text longer than {LONGEST_TEXT // 2**20} MiB was cut at the ends of lines"


class RawRecord(NamedTuple):
    """One parsed record, or the reason why there is none.

    `line` counts from 1 and is where the record begins (for parquet: the row). `nth` counts the records of a JSON
    list from 1, and is set only where several records share a line. `note` is said, but the record is used.
    """

    line: int
    value: Any = None
    problem: str = ""
    nth: int = 0
    note: str = ""


def texts(stream: BinaryIO, split: TxtSplit) -> Iterator[RawRecord]:
    """The texts of a file, each {"text": ...} with the line where it begins; line breaks inside are kept.

    auto: at blank lines where the beginning of the file has them, else at every line. Holds one text at a time.
    """
    head = stream.read(_PEEK_BYTES)
    stream.seek(0)
    unit = separator(head) if split == "auto" else split
    note = "" if split != "auto" else ONE_A_LINE if unit == "line" else AT_BLANK_LINES
    if unit == "line" and head.removeprefix(BOM).strip().count(b"\n") == 0:
        note = ""  # there is nothing to separate
    longest = MAX_RECORD_BYTES if unit == "uncut" else LONGEST_TEXT
    lines: list[bytes] = []
    n_bytes, start, was_cut = 0, 1, False
    for number, line in bounded_lines(stream):
        size = len(line) if line is not None else MAX_RECORD_BYTES + 1
        is_blank = line is not None and not line.removeprefix(BOM).strip()
        is_full = bool(n_bytes) and n_bytes + size > longest and unit in ("paragraph", "file")
        if n_bytes and (unit == "line" or is_full or (is_blank and unit != "file")):
            was_cut = was_cut or (is_full and not is_blank)
            yield from _text(start, lines, n_bytes, longest, CUT if was_cut else note)
            lines, n_bytes, was_cut = [], 0, is_full and not is_blank
        if is_blank and (unit != "file" or not n_bytes):
            continue
        start = start if n_bytes else number
        n_bytes += size
        if line is not None and n_bytes <= MAX_RECORD_BYTES:
            lines.append(line.removeprefix(BOM).rstrip(b"\r\n"))
    if n_bytes:
        yield from _text(start, lines, n_bytes, longest, CUT if was_cut else note)


def separator(head: bytes) -> Literal["line", "paragraph"]:
    """What separates the texts of a file that begins like this.

    b"a\\nb\\nc\\n" -> line        b"a\\nb\\n\\nc\\n" -> paragraph
    """
    filled = [bool(line.strip()) for line in head.removeprefix(BOM).strip().split(b"\n")]
    n_blocks = sum(now and not before for before, now in zip([False, *filled], filled, strict=False))
    return "paragraph" if n_blocks > 1 and sum(filled) <= n_blocks * _LINES_PER_BLANK else "line"


def bounded_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) pairs; None in place of a line that is longer than MAX_RECORD_BYTES."""
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) <= MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD_BYTES)
        yield number, None


def too_long() -> str:
    """Why a record is not read, with the limit as it is now."""
    return f"longer than {MAX_RECORD_BYTES / 2**20:g} MiB"


def not_utf8(error: UnicodeDecodeError) -> str:
    """Why a line is not read: the byte, its column, and what to do."""
    return (
        f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1} "
        "(if the file is in another encoding, such as GBK, convert it)"
    )


def _text(start: int, lines: list[bytes], n_bytes: int, longest: int, note: str) -> Iterator[RawRecord]:
    """The text of some lines; in pieces where it is longer than `longest` characters."""
    if n_bytes > MAX_RECORD_BYTES:
        yield RawRecord(start, problem=f"a paragraph {too_long()}; put blank lines between texts")
        return
    decoded = []
    for offset, line in enumerate(lines):
        try:
            decoded.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield RawRecord(start, problem=f"line {start + offset}: {not_utf8(error)}")
            return
    text = "\n".join(decoded).rstrip("\n")
    pieces = [text[place : place + longest] for place in range(0, len(text), longest)]
    for nth, piece in enumerate(pieces, start=1):
        yield RawRecord(
            start, {"text": piece}, nth=nth if len(pieces) > 1 else 0, note=note if len(pieces) == 1 else CUT
        )
