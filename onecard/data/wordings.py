"""Questions with a chain of thought in many wordings, as FLAN and Alpaca-CoT have their sets; the wordings are ours.

A wording is drawn by a hash of the seed and the question: the same row has the same wording in any order.
https://arxiv.org/abs/2301.13688 (why wordings are mixed)

Knows texts, and rows of question, answer and rationale. Does not know how they are trained on.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onecard.data.thoughts import with_thought
from onecard.errors import DataError

_CHINESE = re.compile("[\u4e00-\u9fff]")
_COLUMNS = ("question", "answer", "rationale")


class CotRow(NamedTuple):
    """The line (from 1) of a question, the question, its answer, and how one gets there."""

    line: int
    question: str
    answer: str
    rationale: str


@lru_cache(maxsize=1)
def wordings() -> dict[str, Any]:
    """The texts of wordings.yaml by language."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found


def language_of(text: str) -> str:
    """zh for a text with Chinese characters, else en."""
    return "zh" if _CHINESE.search(text) else "en"


def worded(row: CotRow, seed: int, *, as_thought: bool = False) -> dict[str, str]:
    """An instruction and an output in one of the wordings; as_thought: the rationale as <think>, the question as it is.

    The language is that of the question.
    """
    if as_thought:
        return {"instruction": row.question, "input": "", "output": with_thought(row.rationale, row.answer)}
    known = wordings()[language_of(row.question)]["cot"]
    digest = hashlib.blake2b(f"{seed} {row.question}".encode(), digest_size=8).digest()
    question, answer = known[int.from_bytes(digest, "big") % len(known)]
    fields = {
        "question": row.question,
        "answer": row.answer.rstrip(".") if answer.endswith("}.") else row.answer,
        "rationale": row.rationale,
    }
    return {"instruction": question.format(**fields), "input": "", "output": answer.format(**fields)}


def read_cot_tsv(path: Path) -> Iterator[CotRow | DataError]:
    """The rows of a TSV of question, answer and rationale, in this order or as its header says; bad lines as errors.

    Written "\\n" and "\\t" are line breaks and tabs, as in FLAN's files. Raises DataError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _cot_rows(path, csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as reason:
        raise DataError(f"cannot be read as TSV: {reason}", str(path)) from reason


def _cot_rows(path: Path, lines: Iterable[list[str]]) -> Iterator[CotRow | DataError]:
    order = [0, 1, 2]
    for line, cells in enumerate(lines, start=1):
        names = [cell.strip().lower() for cell in cells]
        if line == 1 and set(_COLUMNS) <= set(names):
            order = [names.index(name) for name in _COLUMNS]
        elif cells:
            yield _cot_row(cells, order, path, line)


def _cot_row(cells: list[str], order: list[int], path: Path, line: int) -> CotRow | DataError:
    if len(cells) <= max(order):
        return DataError(f"{len(cells)} fields; question, answer and rationale are expected", path.name, line)
    texts = [cells[place].replace("\\n", "\n").replace("\\t", "\t").strip() for place in order]
    empty = [name for name, text in zip(_COLUMNS, texts, strict=True) if not text]
    return DataError(f"the {empty[0]} is empty", path.name, line) if empty else CotRow(line, *texts)
