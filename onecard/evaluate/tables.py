"""Benchmarks in folders of tables, as their authors publish them: C-Eval, CMMLU, MMLU and MMCU.

ceval    {dev,val,test}/SUBJECT_{dev,val,test}.csv   id,question,A,B,C,D,answer,explanation
cmmlu    {dev,test}/SUBJECT.csv                      ,Question,A,B,C,D,Answer
mmlu     {dev,val,test}/SUBJECT_{dev,val,test}.csv   question, options and answer without a header
mmcu     {dev,test}/SUBJECT.xlsx (or .csv)           question, options, answer, which may be several letters
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from onecard.console import few
from onecard.data.values import safe
from onecard.errors import ConfigError, DataError
from onecard.evaluate.questions import (
    OPTION_MARK,
    SUITE_FLAG,
    ChoiceQuestion,
    ChoiceSuite,
    QuestionFile,
    QuestionRow,
    digest_of_files,
    questions_of,
)

SPLITS = ("val", "test", "dev")


def read_folders(kind: str, path: Path, split: str) -> ChoiceSuite:
    """C-Eval, CMMLU, MMLU or MMCU: the split that is asked, and dev as examples."""
    root = path if any((path / name).is_dir() for name in SPLITS) else path / "data"
    there = [name for name in SPLITS if (root / name).is_dir()]
    if not there:
        raise ConfigError(SUITE_FLAG, f"{path} has no folder dev, val or test; give the folder that holds them")
    wanted = ("val" if kind == "ceval" and "val" in there else "test") if split == "auto" else split
    if wanted not in there:
        raise ConfigError("--split", f"{path} has no folder {wanted}; there are {', '.join(there)}")
    parts = list(_parts(kind, root / wanted))
    examples: dict[str, tuple[ChoiceQuestion, ...]] = {}
    if "dev" in there and wanted != "dev":
        for part in _parts(kind, root / "dev"):
            examples[part.subject] = tuple(questions_of(f"{kind}/dev", part))
    names, titles = categories_of(kind)
    if kind == "mmcu":
        for part in parts:
            names[part.subject] = (part.file.stem.partition("_")[0],)
            medical = examples.get(part.file.stem, ())  # one file of examples for all sheets
            examples.setdefault(part.subject, medical)
    files = sorted({part.file for part in parts} | {file for file in (root / "dev").glob("*") if file.is_file()})
    questions = tuple(question for part in parts for question in questions_of(f"{kind}/{wanted}", part))
    return ChoiceSuite(kind, path, wanted, questions, examples, names, titles, digest_of_files(files))


def _parts(kind: str, folder: Path) -> Iterator[QuestionFile]:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".xlsx"))
    if not files:
        raise DataError("holds no csv or xlsx file", str(folder))
    for file in files:
        if kind == "mmcu":
            yield from _mmcu(file)
            continue
        subject = file.stem.removesuffix(f"_{folder.name}")
        rows = list(_without_header(file) if kind == "mmlu" else _with_header(file))
        if not rows:
            raise DataError("holds no question", str(file))
        yield QuestionFile(file, subject, rows)


def _with_header(file: Path) -> Iterator[QuestionRow]:
    lines = _table(file)
    _, header = next(lines, (0, []))
    columns = {name.strip().lower(): number for number, name in enumerate(header)}
    missing = [name for name in ("question", "a", "b", "c", "d") if name not in columns]
    if missing:
        raise DataError(
            f"the column {missing[0]!r} is missing; there are {few([safe(x) for x in header], 8)}", str(file)
        )
    for line, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{len(cells)} fields, {len(header)} are expected", str(file), line)
        named = {name: cells[number] for name, number in columns.items()}
        options = tuple(named[name] for name in "abcd")
        yield QuestionRow(line, named["question"], options, named.get("answer", ""), named.get("explanation", ""))


def _without_header(file: Path) -> Iterator[QuestionRow]:
    for line, cells in _table(file):
        if len(cells) != 6:
            raise DataError(f"{len(cells)} fields, 6 are expected: question, four options, answer", str(file), line)
        yield QuestionRow(line, cells[0], tuple(cells[1:5]), cells[5])


def _table(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file with the line on which each ends; empty ones are left out."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise DataError(f"is no UTF-8 ({reason}); save it as UTF-8", str(file)) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
    except csv.Error as reason:
        raise DataError(f"is no CSV: {reason}", str(file), reader.line_num) from None


def _mmcu(file: Path) -> Iterator[QuestionFile]:
    """The sheets of a file: a header, then question, options, answer."""
    sheets = [(file.stem, list(_table(file)))] if file.suffix == ".csv" else _sheets(file)
    for subject, lines in sheets:
        rows = []
        for line, cells in lines[1:]:
            if len(cells) < 4:
                raise DataError(f"{len(cells)} columns: a question, options and an answer expected", str(file), line)
            options = [OPTION_MARK.sub("", cell).strip() for cell in cells[1:-1]]
            while options and not options[-1]:
                options.pop()
            rows.append(QuestionRow(line, cells[0], tuple(options), cells[-1]))
        yield QuestionFile(file, subject, rows)


def _sheets(file: Path) -> list[tuple[str, list[tuple[int, list[str]]]]]:
    try:
        import openpyxl  # optional: requirements-eval.txt
    except ImportError:
        raise ConfigError(
            SUITE_FLAG, f"{file} is an Excel file, which needs openpyxl: pip install -r requirements-eval.txt"
        ) from None
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except Exception as reason:  # whatever zipfile, xml and openpyxl raise for a file that is none
        raise DataError(f"is no Excel file: {reason}", str(file)) from None
    found = []
    for sheet in book.worksheets:
        width = next((len([cell for cell in row if cell is not None]) for row in sheet.iter_rows(values_only=True)), 0)
        lines = []
        for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
            cells = ["" if cell is None else str(cell) for cell in row[:width]]
            if any(cell.strip() for cell in cells):
                lines.append((number, cells))
        if lines:
            found.append((sheet.title if len(book.worksheets) > 1 else file.stem, lines))
    book.close()
    return found


@lru_cache(maxsize=1)
def _subjects() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("subjects.yaml").read_text(encoding="utf-8"))
    return found


def categories_of(kind: str) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The categories of each subject, and its name in prompts."""
    names: dict[str, tuple[str, ...]] = {}
    titles: dict[str, str] = {}
    for category, subjects in _subjects().get(kind, {}).items():
        for subject in subjects:
            names[subject] = (*names.get(subject, ()), category)
            if isinstance(subjects, dict):
                titles[subject] = subjects[subject]
    return names, titles
