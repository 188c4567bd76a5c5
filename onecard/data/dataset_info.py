"""LLaMA-Factory's dataset_info.json: a folder of data sets, each by name with its description."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from onecard.data.description import DatasetDescription, described
from onecard.errors import DataError

FILE_NAME = "dataset_info.json"


def names_in(folder: Path) -> list[str]:
    """The names that a folder's dataset_info.json describes; none where it has no such file. Raises DataError."""
    file = folder / FILE_NAME
    return list(_read(file, file.stat().st_mtime_ns)) if file.is_file() else []


def description_in(folder: Path, name: str) -> DatasetDescription:
    """The description of one of `names_in`. Raises DataError for one that is not understood."""
    file = folder / FILE_NAME
    return described(name, _read(file, file.stat().st_mtime_ns)[name], str(file))


@lru_cache(maxsize=8)
def _read(file: Path, _changed_ns: int) -> dict[str, Any]:
    try:
        plain = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as reason:
        raise DataError(f"cannot be read as JSON: {reason}", str(file)) from reason
    if not isinstance(plain, dict):
        raise DataError("is no object that has a description under each name", str(file))
    return plain
