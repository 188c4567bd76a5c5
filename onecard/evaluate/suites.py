"""Multiple choice from local folders, as the authors publish it: C-Eval, CMMLU, MMLU, MMCU and GAOKAO-Bench.

    ceval    {dev,val,test}/SUBJECT_{dev,val,test}.csv   id,question,A,B,C,D,answer,explanation
    cmmlu    {dev,test}/SUBJECT.csv                      ,Question,A,B,C,D,Answer
    mmlu     {dev,val,test}/SUBJECT_{dev,val,test}.csv   question, options and answer without a header
    mmcu     {dev,test}/SUBJECT.xlsx (or .csv)           question, options, answer, which may be several letters
             or JSON of Alpaca-CoT                       {"类别", "题目", "选项", "答案"}
    gaokao   Objective_Questions/*.json                  {"keywords", "example": [{"question", "answer": ["A"]}]}

Knows files. Does not know prompts or models.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onecard.console import few
from onecard.data.values import safe
from onecard.errors import ConfigError, DataError
from onecard.storage import sha256_of

SUITE_FLAG = "--suite"
SPLITS = ("val", "test", "dev")
_WIDE = str.maketrans("ＡＢＣＤＥＦＧ", "ABCDEFG", " \u3000,，、;；")
_OPTION_MARK = re.compile(r"^\s*[A-GＡ-Ｇ]\s*[.．、:：]\s*")
_GAOKAO_NAME = re.compile(r"[\d-]+_(Political_Science|[A-Za-z]+)_?(.*)")


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


class _Row(NamedTuple):
    """A line of a file: question, options, answer, explanation."""

    line: int
    question: str
    options: tuple[str, ...]
    answer: str
    explanation: str = ""


class _Part(NamedTuple):
    """A file, or a sheet of one, with its subject and rows."""

    file: Path
    subject: str
    rows: list[_Row]


def load_choice_suite(kind: str, path: Path, *, split: str = "auto", subjects: Sequence[str] = ()) -> ChoiceSuite:
    """Read a benchmark; `kind` auto: known by its layout. Raises ConfigError and DataError, each with its place."""
    kind = layout_of(path) if kind == "auto" else kind
    if kind == "gaokao":
        suite = _gaokao(path)
    elif path.is_file():
        suite = _alpaca_cot_mmcu(path)
    else:
        suite = _folders(kind, path, split)
    if subjects:
        unknown = [name for name in subjects if name not in {question.subject for question in suite.questions}]
        if unknown:
            known = few(sorted({question.subject for question in suite.questions}), 8)
            raise ConfigError("--subjects", f"{unknown[0]!r} is no subject in {path}; there are {known}")
        kept = tuple(question for question in suite.questions if question.subject in subjects)
        suite = replace(suite, questions=kept)
    if not suite.questions:
        raise DataError("holds no question", str(path))
    return suite


def layout_of(path: Path) -> str:
    """Which benchmark lies there. Raises ConfigError with what was looked for."""
    if any(_is_gaokao(file) for file in _gaokao_files(path)):
        return "gaokao"
    if path.is_file() and path.suffix == ".json" and "题目" in _peek(path):
        return "mmcu"
    folder = next((path / split for split in SPLITS if (path / split).is_dir()), None)
    folder = folder or next((path / "data" / split for split in SPLITS if (path / "data" / split).is_dir()), None)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".xlsx")) if folder else []
    if files and files[0].suffix == ".xlsx":
        return "mmcu"
    if files:
        first = _peek(files[0]).partition("\n")[0].strip().lstrip("\ufeff")
        if first.startswith("id,question,A,"):
            return "ceval"
        if first.startswith(",Question,A,"):
            return "cmmlu"
        if re.search("[\u4e00-\u9fff]", first):
            return "mmcu"
        cells = next(csv.reader(io.StringIO(_peek(files[0]))), [])
        if len(cells) == 6 and cells[-1].strip() in tuple("ABCD"):
            return "mmlu"
    raise ConfigError(
        SUITE_FLAG,
        f"{path} has the layout of none of C-Eval, CMMLU, MMLU, MMCU (folders dev, val, test of csv or xlsx) and "
        "GAOKAO-Bench (Objective_Questions/*.json); give the folder as its authors publish it, or name what it is, "
        "such as ceval:PATH, open:FILE, extraction:FILE, perplexity:FILE",
    )


def _peek(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(65536).decode("utf-8", "replace")


# --- folders of tables ------------------------------------------------------------------------------------------------


def _folders(kind: str, path: Path, split: str) -> ChoiceSuite:
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
            examples[part.subject] = tuple(_questions(f"{kind}/dev", part))
    names, titles = _categories(kind)
    if kind == "mmcu":
        for part in parts:
            names[part.subject] = (part.file.stem.partition("_")[0],)
            medical = examples.get(part.file.stem, ())  # one file of examples for all sheets
            examples.setdefault(part.subject, medical)
    files = sorted({part.file for part in parts} | {file for file in (root / "dev").glob("*") if file.is_file()})
    questions = tuple(question for part in parts for question in _questions(f"{kind}/{wanted}", part))
    return ChoiceSuite(kind, path, wanted, questions, examples, names, titles, _digest(files))


def _parts(kind: str, folder: Path) -> Iterator[_Part]:
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
        yield _Part(file, subject, rows)


def _with_header(file: Path) -> Iterator[_Row]:
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
        told = {name: cells[number] for name, number in columns.items()}
        options = tuple(told[name] for name in "abcd")
        yield _Row(line, told["question"], options, told.get("answer", ""), told.get("explanation", ""))


def _without_header(file: Path) -> Iterator[_Row]:
    for line, cells in _table(file):
        if len(cells) != 6:
            raise DataError(f"{len(cells)} fields, 6 are expected: question, four options, answer", str(file), line)
        yield _Row(line, cells[0], tuple(cells[1:5]), cells[5])


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


def _mmcu(file: Path) -> Iterator[_Part]:
    """The sheets of a file: a header, then question, options, answer."""
    sheets = [(file.stem, list(_table(file)))] if file.suffix == ".csv" else _sheets(file)
    for subject, lines in sheets:
        rows = []
        for line, cells in lines[1:]:
            if len(cells) < 4:
                raise DataError(f"{len(cells)} columns: a question, options and an answer expected", str(file), line)
            options = [_OPTION_MARK.sub("", cell).strip() for cell in cells[1:-1]]
            while options and not options[-1]:
                options.pop()
            rows.append(_Row(line, cells[0], tuple(options), cells[-1]))
        yield _Part(file, subject, rows)


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


def _questions(start: str, part: _Part) -> Iterator[ChoiceQuestion]:
    answers = [_letters(row, part.file) for row in part.rows]
    is_multiple = any(len(answer) > 1 for answer in answers)
    for number, (row, answer) in enumerate(zip(part.rows, answers, strict=True)):
        letters = "ABCDEFG"[: len(row.options)]
        lines = [row.question.strip(), *(f"{letter}. {option}" for letter, option in zip(letters, row.options))]  # noqa: B905
        key = f"{start}/{part.subject}/{number}"
        yield ChoiceQuestion(
            key, part.subject, "\n".join(lines), letters, answer, row.options, row.explanation, is_multiple
        )


def _letters(row: _Row, file: Path) -> str:
    """The right letters in order. Raises DataError for an answer that is none of the options."""
    answer = row.answer.strip().translate(_WIDE).upper()
    known = "ABCDEFG"[: len(row.options)]
    if not 2 <= len(row.options) <= 7:
        raise DataError(f"{len(row.options)} options; 2 to 7 are expected", str(file), row.line)
    if any(letter not in known for letter in answer):
        expected = f"one of {', '.join(known)}"
        raise DataError(f"the answer is {safe(row.answer)!r}, {expected} is expected", str(file), row.line)
    return "".join(sorted(set(answer)))


@lru_cache(maxsize=1)
def _subjects() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("subjects.yaml").read_text(encoding="utf-8"))
    return found


def _categories(kind: str) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The categories of each subject, and its name in prompts."""
    names: dict[str, tuple[str, ...]] = {}
    titles: dict[str, str] = {}
    for category, subjects in _subjects().get(kind, {}).items():
        for subject in subjects:
            names[subject] = (*names.get(subject, ()), category)
            if isinstance(subjects, dict):
                titles[subject] = subjects[subject]
    return names, titles


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {sha256_of(file)}\n".encode())
    return found.hexdigest()


# --- JSON -------------------------------------------------------------------------------------------------------------


def _alpaca_cot_mmcu(path: Path) -> ChoiceSuite:
    """The MMCU of Alpaca-CoT's evaluation: a list of {"类别", "题目", "选项": "A:...\\nB:...", "答案"}."""
    rows: dict[str, list[_Row]] = {}
    items = _json(path)
    for number, item in enumerate(items if isinstance(items, list) else [items], start=1):
        values = [item.get(name) if isinstance(item, dict) else None for name in ("类别", "题目", "选项", "答案")]
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"record {number} has not the texts 类别, 题目, 选项 and 答案", str(path))
        subject, question, listed, answer = map(str, values)
        options = tuple(_OPTION_MARK.sub("", option).strip() for option in listed.strip().split("\n"))
        rows.setdefault(subject, []).append(_Row(number, question, options, answer))
    parts = [_Part(path, subject, found) for subject, found in rows.items()]
    questions = tuple(question for part in parts for question in _questions("mmcu", part))
    names: dict[str, tuple[str, ...]] = {part.subject: (part.subject,) for part in parts}
    return ChoiceSuite("mmcu", path, "test", questions, {}, names, {}, _digest([path]))


def _gaokao_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".json" else []
    for inner in ("", "Objective_Questions", "Data/Objective_Questions"):
        files = sorted((path / inner).glob("*.json"))
        if files:
            return files
    return []


def _is_gaokao(file: Path) -> bool:
    return '"example"' in _peek(file) and '"keyword' in _peek(file)


def _gaokao(path: Path) -> ChoiceSuite:
    files = [file for file in _gaokao_files(path) if _is_gaokao(file)]
    if not files:
        raise ConfigError(SUITE_FLAG, f"{path} holds no JSON of GAOKAO-Bench with keywords and a list example")
    questions: list[ChoiceQuestion] = []
    categories: dict[str, tuple[str, ...]] = {}
    for file in files:
        told = _json(file)
        name = str(told.get("keywords") or told.get("keyword"))
        match = _GAOKAO_NAME.fullmatch(name)
        category, subject = match.groups() if match else (name, "")
        subject = f"{category}_{subject}".rstrip("_")
        categories[subject] = (category,)
        found = [
            part for number, item in enumerate(told["example"]) for part in _gaokao_parts(file, subject, number, item)
        ]
        is_multiple = any(len(question.answer) > 1 for question in found)
        questions += [replace(question, is_multiple=is_multiple) for question in found]
    return ChoiceSuite("gaokao", path, "all", tuple(questions), {}, categories, {}, _digest(files))


def _gaokao_parts(file: Path, subject: str, number: int, item: Any) -> Iterator[ChoiceQuestion]:
    answers = item.get("answer") if isinstance(item, dict) else None
    if not isinstance(answers, list) or not answers or not isinstance(item.get("question"), str):
        raise DataError(f"example {number} has not a text question and a list answer", str(file))
    named = re.findall(r"(?<![A-Za-z])([A-G])\s*[.．、]", item["question"])
    letters = "ABCDEFG" if {"E", "F", "G"} <= set(named) else "ABCD"
    for k, answer in enumerate(answers, start=1):
        row = _Row(0, item["question"], tuple(letters), str(answer))
        try:
            right = _letters(row, file)
        except DataError as reason:
            raise DataError(f"example {number}: {str(reason).removeprefix(f'{file}: ')}", str(file)) from None
        yield ChoiceQuestion(
            f"gaokao/{subject}/{number}/{k}", subject, item["question"].strip(), letters, right, (),
            str(item.get("analysis") or ""), False, (k, len(answers)), float(item.get("score") or 1),
        )  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise DataError(f"is no UTF-8 ({reason})", str(path)) from None
    except ValueError as reason:
        raise DataError(f"is no JSON: {reason}", str(path), getattr(reason, "lineno", None)) from None
