"""Multiple choice from local folders, as the authors publish it: C-Eval, CMMLU, MMLU, MMCU and GAOKAO-Bench.

Tells the layouts apart; tables.py and json_suites.py read them. Knows files. Does not know prompts or models.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onecard.console import few
from onecard.errors import ConfigError, DataError
from onecard.evaluate.json_suites import gaokao_files, read_alpaca_cot_mmcu, read_gaokao
from onecard.evaluate.questions import SUITE_FLAG, ChoiceSuite, beginning_of
from onecard.evaluate.tables import SPLITS, read_folders


def load_choice_suite(kind: str, path: Path, *, split: str = "auto", subjects: Sequence[str] = ()) -> ChoiceSuite:
    """Read a benchmark; `kind` auto: known by its layout. Raises ConfigError and DataError, each with its place."""
    kind = layout_of(path) if kind == "auto" else kind
    if kind == "gaokao":
        suite = read_gaokao(path)
    elif path.is_file():
        suite = read_alpaca_cot_mmcu(path)
    else:
        suite = read_folders(kind, path, split)
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
    if gaokao_files(path):
        return "gaokao"
    if path.is_file() and path.suffix == ".json" and "题目" in beginning_of(path):
        return "mmcu"
    folder = next((path / split for split in SPLITS if (path / split).is_dir()), None)
    folder = folder or next((path / "data" / split for split in SPLITS if (path / "data" / split).is_dir()), None)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".xlsx")) if folder else []
    if files and files[0].suffix == ".xlsx":
        return "mmcu"
    if files:
        first = beginning_of(files[0]).partition("\n")[0].strip().lstrip("\ufeff")
        if first.startswith("id,question,A,"):
            return "ceval"
        if first.startswith(",Question,A,"):
            return "cmmlu"
        if re.search("[\u4e00-\u9fff]", first):
            return "mmcu"
        cells = next(csv.reader(io.StringIO(beginning_of(files[0]))), [])
        if len(cells) == 6 and cells[-1].strip() in tuple("ABCD"):
            return "mmlu"
    raise ConfigError(
        SUITE_FLAG,
        f"{path} has the layout of none of C-Eval, CMMLU, MMLU, MMCU (folders dev, val, test of csv or xlsx) and "
        "GAOKAO-Bench (Objective_Questions/*.json); give the folder as its authors publish it, or name what it is, "
        "such as ceval:PATH, open:FILE, extraction:FILE, perplexity:FILE",
    )
