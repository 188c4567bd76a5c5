"""Examples to click on, out of the project's own sample data; none where that is not there.

Knows two files and their shapes. It does not know the pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).resolve().parents[2] / "sample"
QUESTIONS, CHATS = SAMPLE / "merge_sample.json", SAMPLE / "chat_sample.json"


def questions(path: Path = QUESTIONS, n: int = 6) -> list[list[str]]:
    """The first `n` records of a file of instructions as [instruction, input]."""
    records = [record for record in _records(path) if "instruction" in record]
    return [[str(record["instruction"]), str(record.get("input", ""))] for record in records[:n]]


def first_messages(path: Path = CHATS, n: int = 4) -> list[str]:
    """The first questions of the first `n` conversations in a file with lists of input and output turns."""
    chats = [record["input"] for record in _records(path) if isinstance(record.get("input"), list) and record["input"]]
    return [str(turns[0]) for turns in chats[:n]]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []
