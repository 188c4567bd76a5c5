"""Every text that a person reads on the pages, in English and in Chinese.

Knows words only; which component shows them is app.py's business, and when, the handlers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

LANGUAGES = {"en": "English", "zh": "中文"}
STATIC = Path(__file__).parent / "static"  # what is sent to the browser, and the words


@cache
def all_words() -> Mapping[str, Mapping[str, str]]:
    """The texts of `static/words.yaml` by language and key."""
    words: Mapping[str, Mapping[str, str]] = yaml.safe_load((STATIC / "words.yaml").read_text(encoding="utf-8"))
    return words


def word(language: str, key: str, **values: object) -> str:
    """The text of this key; English for a language that is not known. `values` fill its places."""
    text = all_words().get(language, all_words()["en"])[key]
    return text.format(**values) if values else text


def language_of(browser: str, wanted: str = "auto") -> str:
    """The page's language from the browser's tag: "zh-Hans-CN" -> "zh", "de" -> "en"; `wanted` wins where it is set."""
    if wanted in LANGUAGES:
        return wanted
    return "zh" if browser.lower().startswith("zh") else "en"
