"""What a model wrote, read with care: JSON objects among other words, a thought before an answer, the end of an answer.

Knows texts. Does not know who wrote them.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from onecard.curation.make.novelty import rouge_l
from onecard.curation.words import words_of
from onecard.data.json_records import RecordDecoder
from onecard.data.thoughts import closing_mark

_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
_FINAL = re.compile(r"(?:####|answer(?: is\b|\s*[:：])|答案(?:是|为|\s*[:：]))[\s:：]*(?P<rest>[^\n]+)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_SHORT_WORDS = 12
ALIKE = 0.6


@lru_cache(maxsize=1)
def prompts() -> dict[str, dict[str, str]]:
    """The texts of prompts.yaml by language and name."""
    import yaml

    found: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text("utf-8"))
    return found


def objects_in(text: str) -> list[dict[str, Any]]:
    """The whole JSON objects in a text, in order; what stands between them, or is cut off at the end, is passed over.

    'Sure:\\n```json\\n[{"a": 1}, {"a": 2}, {"a": ' -> [{"a": "1"}, {"a": "2"}]
    """
    decoder, found, place = RecordDecoder(), [], text.find("{")
    while place >= 0:
        try:
            value, end, problem = decoder.at(text, place)
        except (json.JSONDecodeError, RecursionError):
            end = place + 1
        else:
            found += [value] if isinstance(value, dict) and not problem else []
        place = text.find("{", end)
    return found


def texts_in(item: dict[str, Any], *keys: str) -> list[str]:
    """The stripped texts under these keys; what is missing or no text is empty."""
    return [value.strip() if isinstance(value := item.get(key), str) else "" for key in keys]


def split_thought(text: str, apart: str = "") -> tuple[str, str]:
    """(thought, answer) of what a model wrote; `apart`: the thought that the server gave on its own.

    A template that opens the thought in the prompt leaves only the closing mark: "Hm.</think>4" -> ("Hm.", "4").
    """
    if apart.strip():
        return apart.strip(), text.strip()
    if found := _THOUGHT.match(text):
        return found[2].strip(), text[found.end() :].strip()
    before, mark, after = text.partition(closing_mark("<think>"))
    return (before.strip(), after.strip()) if mark else ("", text.strip())


def agrees(answer: str, expected: str) -> bool:
    """Whether two answers say the same: equal ends ("#### 4", "the answer is 4", "4", a LaTeX box), else alike texts.

    Long answers without such an end agree where their ROUGE-L is 0.6 or more.
    """
    given, wanted = _end_of(answer), _end_of(expected)
    if wanted is None:
        return rouge_l(answer, expected) >= ALIKE
    if given is None:
        # A long answer to a question with a short one: its last number is compared with a number only.
        numbers = _NUMBER.findall(answer)
        return bool(_NUMBER.fullmatch(wanted) and numbers and _plain(numbers[-1]) == _plain(wanted))
    return _plain(given) == _plain(wanted)


def _end_of(answer: str) -> str | None:
    """What an answer comes to, or None where it is a long text without a marked end."""
    if boxed := _BOXED.findall(answer):
        return str(boxed[-1]).strip()
    if marked := [found["rest"].strip() for found in _FINAL.finditer(answer)]:
        return str(marked[-1])
    return answer.strip() if len(words_of(answer)) <= _SHORT_WORDS else None


def _plain(text: str) -> str:
    """An end as it is compared: one number as its value, else its words."""
    numbers = _NUMBER.findall(text)
    if len(numbers) == 1 and not re.search(r"[a-zA-Z]{2}", text):
        return f"{float(numbers[0].replace(',', '')):g}" if len(numbers[0]) < 16 else numbers[0]
    return " ".join(words_of(text))
