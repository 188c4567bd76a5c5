"""Options from the page to the words of a command line, for the kit's own parser to check."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from onecard.config.options import as_typed
from onecard.serve.http_error import bad_request

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
MOST_CHARACTERS = 20_000  # of one value


def words_of(options: dict[str, Any]) -> list[str]:
    """{"lora_r": 8, "data_path": ["a", "b"]} -> ["--lora_r=8", "--data_path=a", "--data_path=b"]; null is left out."""
    words = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [f"--{name}={as_typed(each)}"]
    return words


def checked_options(value: Any, allowed: Collection[str], param: str = "options") -> dict[str, Any]:
    """Options of these names with plain values, as they come from the page. Raises ApiError (400)."""
    if not isinstance(value, dict):
        raise bad_request(f"{param} must be an object of options", param)
    for name, each in value.items():
        if not NAME.fullmatch(name) or name not in allowed:
            raise bad_request(f"--{name[:64]}: no such option here", f"--{name[:64]}")
        for part in each if isinstance(each, list) else [each]:
            if not isinstance(part, (str, int, float, bool, type(None))) or len(str(part)) > MOST_CHARACTERS:
                raise bad_request(f"--{name}: the value must be a text, a number, true, false or null", f"--{name}")
    return value
