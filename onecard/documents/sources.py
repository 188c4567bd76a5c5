"""What a model is shown of the passages, and what its answer cites: numbers, places, and quotes that are looked up.

Knows texts. Does not know how passages are found, nor models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onecard.documents.index import StoredChunk

_CITED = re.compile(r"\[(\d{1,2})\]")
# A quote and the number behind it, before the next sentence: "thirty days" [2]
_QUOTED = re.compile(r"""["“「『]([^"“”「」『』\n]{4,400})["”」』][^\["“「『\n]{0,30}\[(\d{1,2})\]""")
# Of two digits at least: single ones count steps and items.
_NUMBER = re.compile(r"\d[\d,]*\d(?:\.\d+)?|\d\.\d+")


class CheckedQuote(NamedTuple):
    """A quote in an answer, the passage that it is said to be from, and whether it stands there."""

    text: str
    number: int
    is_found: bool


@cache
def wordings() -> dict[str, dict[str, str]]:
    """The texts of prompts.yaml by language."""
    found: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text("utf-8"))
    return found


def prompt_of(question: str, passages: Sequence[StoredChunk], language: str) -> str:
    """The question with the passages that answer it."""
    words = wordings()[language]
    texts = (f"[{number}] {place_of(each, language)}\n{each.text}" for number, each in enumerate(passages, start=1))
    return words["answer"].format(not_there=words["not_there"], passages="\n\n".join(texts), question=question)


def place_of(passage: StoredChunk, language: str) -> str:
    """Where a passage stands: "manual.pdf, page 3, Guide > Setup"."""
    page = wordings()[language]["page"].format(number=passage.page) if passage.page else ""
    return ", ".join(filter(None, (passage.document, page, passage.headings)))


def listing(answer: str, passages: Sequence[StoredChunk], language: str) -> str:
    """What is written below an answer: the passages that it cites, all that were shown where it cites none, quotes that
    do not stand where they should, and numbers that stand nowhere. Nothing below one that says that there is none."""
    words = wordings()[language]
    if answer.strip().startswith(words["not_there"]):
        return ""
    cited = cited_numbers(answer, len(passages))
    title = words["sources" if cited else "shown"]
    numbers = cited or range(1, len(passages) + 1)
    lines = [f"- [{number}] {place_of(passages[number - 1], language)}" for number in numbers]
    wrong = [quote for quote in checked_quotes(answer, passages) if not quote.is_found]
    lines += ["- " + words["not_quoted"].format(number=quote.number, quote=quote.text) for quote in wrong]
    if strange := unfounded_numbers(answer, passages):
        lines.append("- " + words["no_such_number"].format(numbers=", ".join(strange)))
    return f"\n\n{title}:\n\n" + "\n".join(lines)


def without_listing(answer: str) -> str:
    """An earlier answer as the model wrote it."""
    titles = "|".join(re.escape(words[name]) for words in wordings().values() for name in ("sources", "shown"))
    return re.sub(rf"\n\n(?:{titles}):\n\n- \[\d+\] .*\Z", "", answer, flags=re.DOTALL)


def source_fields(answer: str, passages: Sequence[StoredChunk]) -> tuple[Mapping[str, Any], ...]:
    """The passages as a client of the API gets them."""
    cited, quotes = cited_numbers(answer, len(passages)), checked_quotes(answer, passages)
    return tuple(
        {
            "number": number,
            "file": passage.document,
            "page": passage.page or None,
            "headings": passage.headings,
            "text": passage.text,
            "is_cited": number in cited,
            "quotes": [{"text": q.text, "is_found": q.is_found} for q in quotes if q.number == number],
        }
        for number, passage in enumerate(passages, start=1)
    )


def cited_numbers(answer: str, n_passages: int) -> list[int]:
    """The numbers of passages that an answer names, each once: `A [2]. B [1][9].` -> `[2, 1]` of two."""
    found = dict.fromkeys(int(number) for number in _CITED.findall(answer))
    return [number for number in found if 1 <= number <= n_passages]


def checked_quotes(answer: str, passages: Sequence[StoredChunk]) -> list[CheckedQuote]:
    """Each quote of an answer; blanks, line ends and capitals do not count."""
    found = []
    for text, number in _QUOTED.findall(answer):
        passage = passages[int(number) - 1].text if 1 <= int(number) <= len(passages) else ""
        found.append(CheckedQuote(text, int(number), _plain(text) in _plain(passage)))
    return found


def unfounded_numbers(answer: str, passages: Sequence[StoredChunk]) -> list[str]:
    """Numbers of an answer that stand in none of the passages that its model read.

    `900 hours [1], not 1,200` -> `["1,200"]` of a passage with 900.
    """
    there = {number.replace(",", "") for each in passages for text in (each.document, each.headings, each.text)
             for number in _NUMBER.findall(text)}  # fmt: skip
    found = dict.fromkeys(_NUMBER.findall(_CITED.sub("", answer)))
    return [number for number in found if number.replace(",", "") not in there]


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text).rstrip(".,;。，；").lower()
