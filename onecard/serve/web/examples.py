"""Examples to click on, out of the project's own sample data; none where that is not there.

Knows two files and their shapes. It does not know the pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from onecard.installation import SHIPPED

SAMPLE = SHIPPED / "sample"
Example = TypeVar("Example", str, Sequence[str])
QUESTIONS, CHATS = SAMPLE / "merge_sample.json", SAMPLE / "chat_sample.json"


def questions(path: Path = QUESTIONS, n: int = 6) -> list[list[str]]:
    """The first `n` records of each language in a file of instructions as [instruction, input]."""
    records = [record for record in _records(path) if "instruction" in record]
    return _first_of_each([[str(record["instruction"]), str(record.get("input", ""))] for record in records], n)


def first_messages(path: Path = CHATS, n: int = 4) -> list[str]:
    """The first questions of the first `n` conversations of each language in a file with lists of turns."""
    chats = [record["input"] for record in _records(path) if isinstance(record.get("input"), list) and record["input"]]
    return _first_of_each([str(turns[0]) for turns in chats], n)


def examples_in(examples: Sequence[Example], language: str) -> list[Example]:
    """Those that are written in the page's language; all of them where none is."""
    return [example for example in examples if _language(example) == language] or list(examples)


def _first_of_each(examples: list[Any], n: int) -> list[Any]:
    taken = [[example for example in examples if _language(example) == language][:n] for language in ("en", "zh")]
    return [example for example in examples if any(example in some for some in taken)][: 2 * n]


def _language(example: str | Sequence[str]) -> str:
    return "zh" if any("\u4e00" <= sign <= "\u9fff" for sign in "".join(example)) else "en"


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []
