"""Messages in the reader's language: a catalogue in the way of gettext, whose keys are the English texts.

Messages are made where they arise, in English, with their values in them; here a finished line is matched with the
catalogue, in which {name} stands for a value. A line that is in no catalogue stays English. Knows texts alone.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from locale import getlocale
from pathlib import Path

LANGUAGE_FLAG, LANGUAGES = "language", ("auto", "en", "zh")
_NAME = re.compile(r"\{(\w+)\}")
_NUMBERS = frozenset(
    ("n", "m", "good", "all", "tokens", "learned", "cut", "train", "test", "batch", "bits", "rank", "layers", "step",
     "steps")
)  # fmt: skip
# What somebody named or said stays as it is, even where that is a word of the catalogue: a folder called `training`.
_GIVEN = frozenset(("path", "file", "folder", "url", "name", "typed", "text"))
_CELLS = re.compile(r"(\S(?:.*?\S)?)(\s{2,}|$)")
# A flag, or one with its value (--objective grpo), or the place of a record.
_FLAG = re.compile(r"(--\w+(?: \w+)?: |(?:[A-Za-z]:)?[^:]+:\d+(?:#\d+)?: )(.+)")
# What stands in front of a message: the flag or the place that is to blame.
_PREFIX = re.compile(r"((?:note|--\w+|(?:[A-Za-z]:)?[^:]+:\d+(?:#\d+)?|[^\s:]+|\S+\.\w+): )(.+)")
_chosen = {"language": "auto"}


def typed_language(words: Sequence[str]) -> str:
    """The value of --language, whatever else is on the command line; auto where there is none."""
    for word, after in pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name == f"--{LANGUAGE_FLAG}" and (value or after) in LANGUAGES:
            return value or after
    return "auto"


def use_language(language: str) -> None:
    """Choose the language of all messages of this process: auto (that of the locale), en or zh."""
    _chosen["language"] = language


def language() -> str:
    """en or zh: as chosen, else that of the locale."""
    if _chosen["language"] != "auto":
        return _chosen["language"]
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    named = next(filter(None, names), "") or (getlocale()[0] if sys.platform == "win32" else "") or ""
    return "zh" if named.lower().startswith(("zh", "chinese")) else "en"


def translated(message: str, to: str = "") -> str:
    """The message in a language, line by line; by default in that of this process. A page has its own.

    zh: "adapter of step 4 saved in out" -> "第 4 步的适配器已保存到 out"
    """
    to = to or language()
    if to == "en" or message.startswith(("{", "[{")):  # JSON is for programs
        return message
    return "\n".join(_line(line, to) for line in message.split("\n"))


def in_catalogue(text: str, to: str) -> str | None:
    """The translation of a text, values and all, or None."""
    exact, patterns = _catalogue(to)
    if text in exact:
        return exact[text]
    for fixed, pattern, template in patterns:
        if fixed in text and (found := pattern.fullmatch(text)):
            values = found.groupdict()
            values |= {name: _value(value, to) for name, value in values.items() if name not in _GIVEN}
            return template.format_map(values)
    return None


def _value(text: str, to: str) -> str:
    """A value that is a message itself, or several with semicolons between them; any other stays as it is."""
    parts = [in_catalogue(part, to) for part in text.split("; ")]
    return in_catalogue(text, to) or ("；".join(filter(None, parts)) if all(parts) else text)


def _line(line: str, to: str) -> str:
    body = line.strip()
    indent = line[: len(line) - len(line.lstrip())]
    flag = _FLAG.fullmatch(body)
    after = in_catalogue(flag[2], to) if flag else None
    if flag and after:  # before the whole line, in which flag and place would be a part of a value
        return f"{indent}{flag[1]}{after}"
    whole = _value(body, to)
    if whole != body:
        return indent + whole
    cells = [(match[1], match.end() - match.start()) for match in _CELLS.finditer(body)]
    if len(cells) > 1:
        return indent + "".join(_padded(in_catalogue(text, to) or text, width) for text, width in cells).rstrip()
    prefix = _PREFIX.fullmatch(body)
    after = in_catalogue(prefix[2], to) if prefix else None
    return f"{indent}{prefix[1]}{after}" if prefix and after else line


def _padded(text: str, width: int) -> str:
    """The text with blanks behind it; a Chinese character is two columns wide."""
    return text + " " * max(2, width - columns_of(text))


def columns_of(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@cache
def _catalogue(name: str) -> tuple[dict[str, str], list[tuple[str, re.Pattern[str], str]]]:
    """Texts without values; those with some, in the order of the file: longest fixed part, pattern, translation."""
    try:
        import yaml
    except ImportError:  # `onecard quickstart` has yet to install it; messages stay English until then
        return {}, []
    file = Path(__file__).with_name(f"messages_{name}.yaml")
    found: dict[str, str] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    exact = {key: value for key, value in found.items() if not _NAME.search(key)}
    with_values = [(max(_NAME.split(key)[::2], key=len), key) for key in found if key not in exact]
    return exact, [(fixed, _pattern(key), found[key]) for fixed, key in with_values]


def _pattern(key: str) -> re.Pattern[str]:
    parts = _NAME.split(key)  # text, name, text, name, ..., text
    # Two blanks part the cells of a table.
    kinds = {part: r"\d[\d,.]*" if part in _NUMBERS else r"(?:(?!\s\s).)+?" for part in parts[1::2]}
    return re.compile(
        "".join(f"(?P<{part}>{kinds[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )
