"""Benchmarks in JSON, as their authors publish them: GAOKAO-Bench, and the MMCU of Alpaca-CoT's evaluation.

gaokao   Objective_Questions/*.json   {"keywords", "example": [{"question", "answer": ["A"]}]}
mmcu     a file                       [{"类别", "题目", "选项", "答案"}]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onecard.errors import ConfigError, DataError
from onecard.evaluate.questions import (
    OPTION_MARK,
    SUITE_FLAG,
    ChoiceQuestion,
    ChoiceSuite,
    QuestionFile,
    QuestionRow,
    beginning_of,
    digest_of_files,
    questions_of,
    right_letters,
)

_GAOKAO_NAME = re.compile(r"[\d-]+_(Political_Science|[A-Za-z]+)_?(.*)")


def read_alpaca_cot_mmcu(path: Path) -> ChoiceSuite:
    """The MMCU of Alpaca-CoT's evaluation: a list of {"类别", "题目", "选项": "A:...\\nB:...", "答案"}."""
    rows: dict[str, list[QuestionRow]] = {}
    items = read_json(path)
    for number, item in enumerate(items if isinstance(items, list) else [items], start=1):
        values = [item.get(name) if isinstance(item, dict) else None for name in ("类别", "题目", "选项", "答案")]
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"record {number} has not the texts 类别, 题目, 选项 and 答案", str(path))
        subject, question, listed, answer = map(str, values)
        options = tuple(OPTION_MARK.sub("", option).strip() for option in listed.strip().split("\n"))
        rows.setdefault(subject, []).append(QuestionRow(number, question, options, answer))
    parts = [QuestionFile(path, subject, found) for subject, found in rows.items()]
    questions = tuple(question for part in parts for question in questions_of("mmcu", part))
    names: dict[str, tuple[str, ...]] = {part.subject: (part.subject,) for part in parts}
    return ChoiceSuite("mmcu", path, "test", questions, {}, names, {}, digest_of_files([path]))


def gaokao_files(path: Path) -> list[Path]:
    """The JSON files of GAOKAO-Bench at a place; none where it holds no such."""
    if path.is_file():
        return [path] if path.suffix == ".json" and _is_gaokao(path) else []
    for inner in ("", "Objective_Questions", "Data/Objective_Questions"):
        files = sorted((path / inner).glob("*.json"))
        if files:
            return [file for file in files if _is_gaokao(file)]
    return []


def _is_gaokao(file: Path) -> bool:
    return '"example"' in beginning_of(file) and '"keyword' in beginning_of(file)


def gaokao_file(file: Path) -> tuple[str, str, list[Any]]:
    """The keywords of a file, its category in English, and its examples."""
    content = read_json(file)
    name = str(content.get("keywords") or content.get("keyword"))
    match = _GAOKAO_NAME.fullmatch(name)
    return name, match[1] if match else name, content["example"]


def gaokao_subject(keywords: str) -> str:
    """2012-2022_English_Cloze_Test -> English_Cloze_Test"""
    match = _GAOKAO_NAME.fullmatch(keywords)
    return "_".join(filter(None, match.groups())) if match else keywords


def read_gaokao(path: Path) -> ChoiceSuite:
    """The objective questions of GAOKAO-Bench. Raises ConfigError and DataError."""
    files = gaokao_files(path)
    if not files:
        raise ConfigError(SUITE_FLAG, f"{path} holds no JSON of GAOKAO-Bench with keywords and a list example")
    questions: list[ChoiceQuestion] = []
    categories: dict[str, tuple[str, ...]] = {}
    for file in files:
        keywords, category, items = gaokao_file(file)
        subject = gaokao_subject(keywords)
        categories[subject] = (category,)
        found = [part for number, item in enumerate(items) for part in _gaokao_parts(file, subject, number, item)]
        is_multiple = any(len(question.answer) > 1 for question in found)
        questions += [replace(question, is_multiple=is_multiple) for question in found]
    return ChoiceSuite("gaokao", path, "all", tuple(questions), {}, categories, {}, digest_of_files(files))


def _gaokao_parts(file: Path, subject: str, number: int, item: Any) -> Iterator[ChoiceQuestion]:
    answers = item.get("answer") if isinstance(item, dict) else None
    if not isinstance(answers, list) or not answers or not isinstance(item.get("question"), str):
        raise DataError(f"example {number} has not a text question and a list answer", str(file))
    named = re.findall(r"(?<![A-Za-z])([A-G])\s*[.．、]", item["question"])
    letters = "ABCDEFG" if {"E", "F", "G"} <= set(named) else "ABCD"
    for k, answer in enumerate(answers, start=1):
        row = QuestionRow(0, item["question"], tuple(letters), str(answer))
        try:
            right = right_letters(row, file)
        except DataError as reason:
            raise DataError(f"example {number}: {str(reason).removeprefix(f'{file}: ')}", str(file)) from None
        yield ChoiceQuestion(
            f"gaokao/{subject}/{number}/{k}", subject, item["question"].strip(), letters, right, (),
            str(item.get("analysis") or ""), False, (k, len(answers)), float(item.get("score") or 1),
        )  # fmt: skip


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises DataError with the line of what is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise DataError(f"is no UTF-8 ({reason})", str(path)) from None
    except ValueError as reason:
        raise DataError(f"is no JSON: {reason}", str(path), getattr(reason, "lineno", None)) from None
