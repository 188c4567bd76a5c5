"""Open answers: questions of a file with or without references, answered in the model's template and measured.

Read as they are: jsonl or JSON of instruction, input, class, reference; BELLE's and Alpaca-CoT's question, class,
std_answer; Chinese-Vicuna's instruction (and output).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.data.readers import read_file
from onecard.data.values import UnusableRecord, safe, text_of
from onecard.errors import DataError
from onecard.evaluate.measures import Measure, share
from onecard.evaluate.text_metrics import check_metrics, corpus_bleu, record_metrics
from onecard.inference.batch.run import answer_safely
from onecard.inference.call import ModelBundle
from onecard.inference.generate import prepare
from onecard.statistics import mean_interval
from onecard.storage import sha256_of

# Each form: its question, further text, class, and reference (or its other names).
_FORMS = {
    "BELLE": ("question", "", "class", ("std_answer",)),
    "instruction": ("instruction", "input", "class", ("reference", "output")),
}


@dataclass(frozen=True)
class OpenQuestion:
    """A question of a file; `reference` is "" where there is none."""

    key: str
    instruction: str
    input: str = ""
    kind: str = ""
    reference: str = ""

    @property
    def text(self) -> str:
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


def read_open(path: Path, limit: int = 0) -> tuple[str, list[OpenQuestion]]:
    """The form of a file and its questions. Raises DataError with file and line for a record of no form."""
    form = ""
    found: list[OpenQuestion] = []
    for number, (line, record) in enumerate(records_of(path), start=1):
        if limit and len(found) == limit:
            break
        fields = next((name for name, keys in _FORMS.items() if keys[0] in record), "")
        if not fields:
            raise DataError("has neither instruction nor question", str(path), line)
        form = form or fields
        question, more, kind, references = _FORMS[fields]
        try:
            texts = [_text(record, name) for name in (question, more, kind)]
            reference = next((text for name in references if (text := _text(record, name))), "")
        except UnusableRecord as reason:
            raise DataError(str(reason), str(path), line) from None
        found.append(OpenQuestion(str(number), texts[0], texts[1], texts[2], reference))
    if not found:
        raise DataError("holds no question", str(path))
    return form, found


def records_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a json or jsonl file with their lines. Raises DataError where one is broken."""
    for raw in read_file(path):
        if raw.problem or not isinstance(raw.value, dict):
            raise DataError(raw.problem or f"is no object: {safe(str(raw.value))}", str(path), raw.line)
        yield raw.line, raw.value


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name) if name else None
    return "" if value is None else text_of(value, f'"{name}"', [])


class OpenTask:
    """The questions of a file; every answer is kept, and measured where there is a reference."""

    kind = "open"

    def __init__(self, path: Path, *, max_new_tokens: int = 512, seed: int = 42, limit: int = 0) -> None:
        self.name = f"open/{path.name}"
        self._path, self._max_new_tokens, self._seed = path, max_new_tokens, seed
        self.form, self.items = read_open(path, limit)
        if any(item.reference for item in self.items):
            check_metrics()

    def depends_on(self) -> dict[str, Any]:
        """What the answers depend on, besides the model."""
        return {"digest": sha256_of(self._path), "max_new_tokens": self._max_new_tokens}

    def work(self, bundle: ModelBundle, items: Sequence[OpenQuestion]) -> list[dict[str, Any]]:
        """The greedy answer to each question, with its metrics."""
        asked = [(Turn("user", item.instruction, item.input),) for item in items]
        rows = []
        for item, one in zip(items, greedy(bundle, asked, self._max_new_tokens), strict=True):
            row = {"key": item.key, **one}
            if item.reference:
                row |= record_metrics(row["answer"], item.reference)
            rows.append(row)
        return rows

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The metrics in total and by class; the answers that share least with their reference first."""
        items = {item.key: item for item in self.items}
        measures = [self._measure("total", "", rows)]
        for kind in dict.fromkeys(item.kind for item in self.items if item.kind):
            measures.append(self._measure("class", kind, [row for row in rows if items[row["key"]].kind == kind]))
        worst = sorted((row for row in rows if row.get("f1", 1) < 1), key=lambda row: (row["f1"], row["chrf"]))
        without = sum(not item.reference for item in self.items)
        return {
            "settings": {"path": self._path.name, "form": self.form, "max_new_tokens": self._max_new_tokens},
            "measures": [measure.plain() for measure in measures],
            "worst": [
                {"key": row["key"], "question": items[row["key"]].text, "expected": items[row["key"]].reference,
                 "got": row["answer"] or row.get("problem", "")}
                for row in worst
            ],
            "notes": {"no_reference": without, **notes_on(rows)},
        }  # fmt: skip

    def _measure(self, group: str, name: str, rows: Sequence[dict[str, Any]]) -> Measure:
        scored = [row for row in rows if "f1" in row]
        values: dict[str, Any] = {}
        if scored:
            references = {item.key: item.reference for item in self.items}
            values["exact_match"] = share(sum(row["exact_match"] for row in scored), len(scored))
            for metric in ("f1", "chrf", "rouge_1", "rouge_2", "rouge_l"):
                values[metric] = mean_interval([row[metric] for row in scored], seed=self._seed)
            values["bleu"] = corpus_bleu([row["answer"] for row in scored], [references[row["key"]] for row in scored])
        return Measure(group, name, len(rows), values)


def greedy(bundle: ModelBundle, asked: Sequence[tuple[Turn, ...]], max_new_tokens: int) -> list[dict[str, Any]]:
    """The likeliest answer to each conversation, as {"answer", "finish_reason"}; what cannot be asked has a problem."""
    sampling = SamplingOptions(max_new_tokens=max_new_tokens)
    found: list[dict[str, Any]] = [{} for _ in asked]
    rows = []
    for number, turns in enumerate(asked):
        try:
            rows.append(prepare(bundle, turns, sampling, number=number))
        except DataError as reason:
            found[number] = {"answer": "", "finish_reason": "error", "problem": str(reason)}
    for row, answer in zip(rows, answer_safely(bundle, rows, sampling), strict=True):
        found[row.number] = {"answer": answer.text, "finish_reason": answer.finish_reason}
    return found


def notes_on(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What a reader should know of the answers: how many were cut, and how many questions could not be asked."""
    return {
        "cut": sum(row["finish_reason"] == "length" for row in rows),
        "not_asked": sum("problem" in row for row in rows),
    }
