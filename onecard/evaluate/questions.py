"""Questions with lettered options, whichever file they came from: what a benchmark's readers make.

Knows rows and letters. Does not know layouts (suites.py, tables.py, json_suites.py), prompts or models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from onecard.data.values import safe
from onecard.errors import DataError
from onecard.storage import sha256_of

SUITE_FLAG = "--suite"
_WIDE = str.maketrans("ＡＢＣＤＥＦＧ", "ABCDEFG", " \u3000,，、;；")
OPTION_MARK = re.compile(r"^\s*[A-GＡ-Ｇ]\s*[.．、:：]\s*")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with lettered options; `text` is the question with its options, as they are asked.

    answer: the right letters in order; "" where the file does not tell. is_multiple: several letters may be right, by
    its subject. part: (1, 3) is the first of three answers to one text. points: what a right answer is worth.
    """

    key: str
    subject: str
    text: str
    letters: str
    answer: str
    options: tuple[str, ...] = ()
    explanation: str = ""
    is_multiple: bool = False
    part: tuple[int, int] = (1, 1)
    points: float = 1.0


@dataclass(frozen=True)
class ChoiceSuite:
    """The questions of a benchmark in the order of its files, and examples for few shots by subject."""

    kind: str
    path: Path
    split: str
    questions: tuple[ChoiceQuestion, ...]
    examples: dict[str, tuple[ChoiceQuestion, ...]]
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def language(self) -> str:
        return "en" if self.kind == "mmlu" else "zh"

    def title(self, subject: str) -> str:
        """The subject as a prompt names it."""
        return self.titles.get(subject) or subject.replace("_", " ")


class QuestionRow(NamedTuple):
    """A line of a file: question, options, answer, explanation."""

    line: int
    question: str
    options: tuple[str, ...]
    answer: str
    explanation: str = ""


class QuestionFile(NamedTuple):
    """A file, or a sheet of one, with its subject and rows."""

    file: Path
    subject: str
    rows: list[QuestionRow]


def questions_of(start: str, part: QuestionFile) -> Iterator[ChoiceQuestion]:
    """The questions of a file, their keys beginning with `start`. Raises DataError."""
    answers = [right_letters(row, part.file) for row in part.rows]
    is_multiple = any(len(answer) > 1 for answer in answers)
    for number, (row, answer) in enumerate(zip(part.rows, answers, strict=True)):
        letters = "ABCDEFG"[: len(row.options)]
        lines = [row.question.strip(), *(f"{letter}. {option}" for letter, option in zip(letters, row.options))]  # noqa: B905
        key = f"{start}/{part.subject}/{number}"
        yield ChoiceQuestion(
            key, part.subject, "\n".join(lines), letters, answer, row.options, row.explanation, is_multiple
        )


def right_letters(row: QuestionRow, file: Path) -> str:
    """The right letters in order. Raises DataError for an answer that is none of the options."""
    answer = row.answer.strip().translate(_WIDE).upper()
    known = "ABCDEFG"[: len(row.options)]
    if not 2 <= len(row.options) <= 7:
        raise DataError(f"{len(row.options)} options; 2 to 7 are expected", str(file), row.line)
    if any(letter not in known for letter in answer):
        expected = f"one of {', '.join(known)}"
        raise DataError(f"the answer is {safe(row.answer)!r}, {expected} is expected", str(file), row.line)
    return "".join(sorted(set(answer)))


def digest_of_files(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents."""
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {sha256_of(file)}\n".encode())
    return found.hexdigest()


def beginning_of(file: Path) -> str:
    """The first 64 KiB as text."""
    with file.open("rb") as stream:
        return stream.read(65536).decode("utf-8", "replace")
