"""The letters that a freely written answer to a multiple choice chooses: found where it says so, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from onecard.data.thoughts import has_thought, split_thought

_WIDE = str.maketrans("ＡＢＣＤＥＦＧ（）：．，", "ABCDEFG():.,")
_OPENING = r"[\s(\[【\"'“‘*$\\{]*(?:text\{|mathrm\{|(?i:option)\s|选项\s*)?"
_JOINED = r"(?:[\s、,;；和与及&]|and\s)*"


@lru_cache(maxsize=8)
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    one = f"[{letters}]"
    group = rf"{_OPENING}({one}(?:{_JOINED}{one})*)(?![A-Za-z'’])"
    said = (
        rf"(?:答案|选项)(?:的?(?:序号|字母))?(?:应该|应当|应|只能)?(?:是|为|选|:|\s)+{group}",
        rf"(?<![不没未])(?:故|应该|应|因此|所以|可以)?选(?:择|出)?(?:的?是|项|:|\s)*{group}",
        rf"(?i:answer|choice|option)s?(?i:\s+(?:is|are|must be|should be|would be)|\s*:|\s)+\s*{group}",
        rf"boxed\{{{group}",
    )
    # At the beginning, where a lone A may be the article.
    first = rf"^[\s(\[【*\"“]*({one}(?:{_JOINED}{one})*)(?=[.):、,，。\]】*\"”]|\s*$|\s*\n|\s+(?![a-z]))"
    lone = rf"(?<![A-Za-z])({one})(?![A-Za-z'’])(?!\s+(?!or\b|and\b)[a-z])"
    return re.compile("|".join(said)), re.compile(first), re.compile(lone)


def letters_in(text: str, letters: str, options: Sequence[str] = (), *, is_multiple: bool = False) -> str:
    """The letters that an answer chooses, in order; "" where it chooses none, or several and only one may be right.

    In this order: what follows the last "the answer is" and its like; letters at the beginning; the only option whose
    text is quoted; the only letter that stands alone.

    "So the answer is (B)."  ->  "B"      "A cat is no fish."  ->  ""
    """
    answer = split_thought(text)[1].rpartition("</think>")[2].translate(_WIDE)
    if has_thought(answer):  # one that was cut: it has no answer behind it
        return ""
    said, first, lone = _patterns(letters)
    found = [next(filter(None, match.groups())) for match in said.finditer(answer)]
    if not found and (match := first.match(answer)):
        found = [match.group(1)]
    if found:
        return _chosen(found[-1], letters, is_multiple=is_multiple)
    quoted = [letter for letter, option in zip(letters, options, strict=False) if _quotes(answer, option, options)]
    if quoted and not is_multiple:
        return quoted[0] if len(quoted) == 1 else ""
    return _chosen("".join(lone.findall(answer)), letters, is_multiple=is_multiple)


def _chosen(group: str, letters: str, *, is_multiple: bool) -> str:
    chosen = "".join(letter for letter in letters if letter in group)
    return chosen if is_multiple or len(chosen) == 1 else ""


def _quotes(answer: str, option: str, options: Sequence[str]) -> bool:
    """Whether the answer holds this option's text, and not merely as a part of a longer option."""
    option = option.strip()
    if len(option) < 2:
        return False
    for other in options:
        if option != other.strip() and option in other:
            answer = answer.replace(other.strip(), "")
    return option in answer
