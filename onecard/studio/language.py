"""The language of the page, which need not be that of the terminal."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from onecard.studio.http import LANGUAGE_HEADER
from onecard.translation import LANGUAGES, translated


def language_of(request: Request) -> str:
    """en or zh, as the page says."""
    named = request.headers.get(LANGUAGE_HEADER, "en")
    return named if named in LANGUAGES and named != "auto" else "en"


def in_language(value: Any, language: str) -> Any:
    """The same with every text in it as a message of that language; what is no message stays."""
    if isinstance(value, str):
        return translated(value, language)
    return [in_language(each, language) for each in value] if isinstance(value, (list, tuple)) else value
