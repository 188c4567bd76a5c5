"""One value of a record: text to learn, checked, and named in the words of a data file where it is something else."""

from __future__ import annotations

from typing import Any

from onecard.data.json_records import NumberText

NUMBER_AS_TEXT = "a number was taken as text, as it was written"


class UnusableRecord(Exception):
    """Why a record cannot be learned from, in words for the person who owns the file."""


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


def quoted(key: str) -> str:
    """A key between quotes, printable."""
    return f'"{safe(key)}"'


def text_of(value: Any, where: str, notes: list[str]) -> str:
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


def optional_text(value: Any, where: str, notes: list[str]) -> str:
    """As `text_of`; what is missing is an empty text."""
    # NaN is how pandas writes a missing text.
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return text_of(value, where, notes)
