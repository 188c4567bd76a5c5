"""The words by which passages are found: those that are written; of Chinese, Japanese and Korean, pairs of characters.

Overlapping pairs need no dictionary and find as much as segmented words (CONTRIBUTING.md, "Tried"); function words of
questions say nothing about what is asked. Knows texts alone.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_RUN = re.compile(f"[{_CJK}]+|[^\\W_{_CJK}]+")
_IS_CJK = re.compile(f"[{_CJK}]")
_SIGNS = re.compile(r"[^\w \t]+|_")
# A word with a capital inside a sentence.
_NAME = re.compile(r"(?<=[a-z,;:] )[A-Z][^\W_]+")
# "it's", "Smith's": the part behind the apostrophe says nothing.
_CLITIC = re.compile(r"['’](?:s|re|ve|ll|d|m|t)\b", re.IGNORECASE)


def search_words(text: str) -> list[str]:
    """The words under which a passage is found: "Tower 塔身高41米" -> ["tower", "塔身", "身高", "41", "米"]."""
    found: list[str] = []
    for run in _RUN.findall(_CLITIC.sub("", _plain(text)).lower()):
        is_long = len(run) > 1 and _IS_CJK.match(run)
        found += [one + other for one, other in pairwise(run)] if is_long else [run]
    return found


def question_words(text: str) -> list[str]:
    """The words of a question without those that any question has: "塔身多高？" -> ["塔身"], "How high?" -> ["high"].

    All words where nothing else is left.
    """
    english, chinese = _stop_words()
    found = [word for word in search_words(chinese.sub(" ", _plain(text))) if word not in english]
    return list(dict.fromkeys(found or search_words(text)))


def runs_of(text: str) -> list[str | list[str]]:
    """What stands together without a sign between: Chinese without its function words, or words with blanks between.

    "the Moor Tower, 松岭的灯塔" -> [["the", "Moor", "Tower"], "松岭", "灯塔"].
    """
    found: list[str | list[str]] = []
    for part in _SIGNS.split(_stop_words()[1].sub("\n", _CLITIC.sub("", _plain(text)))):
        is_open = False
        for run in _RUN.findall(part):
            if _IS_CJK.match(run):
                found.append(run)
            elif is_open and isinstance(found[-1], list):
                found[-1].append(run)
            else:
                found.append([run])
            is_open = not _IS_CJK.match(run)
    return found


def is_function_word(word: str) -> bool:
    """Whether a word says nothing about what is asked."""
    return word.lower() in _stop_words()[0]


def names_in(text: str) -> list[str]:
    """The names in a text that is written with capitals: "How tall is the Moor Tower?" -> ["moor", "tower"]."""
    return [name.lower() for name in _NAME.findall(text)]


def size_of(text: str) -> int:
    """The length of a text: words, and characters of Chinese, Japanese and Korean.

    Of what is no word, such as base64, 16 characters count as one.
    """
    return sum(len(run) if _IS_CJK.match(run) else 1 + len(run) // 16 for run in _RUN.findall(text))


def _plain(text: str) -> str:
    """One form of what Unicode writes in several: letters with their accents apart, as macOS names files; ligatures of
    print; signs of full width."""
    return unicodedata.normalize("NFKC", text)


@cache
def _stop_words() -> tuple[frozenset[str], re.Pattern[str]]:
    file = Path(__file__).with_name("stop_words.yaml")
    found: dict[str, str] = yaml.safe_load(file.read_text(encoding="utf-8"))
    longest_first = sorted(found["zh"].split(), key=len, reverse=True)
    return frozenset(found["en"].split()), re.compile("|".join(map(re.escape, longest_first)))
