"""What the authors of a benchmark ask to be sent, made of the answers of an evaluation.

    C-Eval   one JSON, {subject: {number: letter}}: https://github.com/hkust-nlp/ceval (How to Submit)
    CMMLU    a row of its README's leaderboard, by pull request: https://github.com/haonan-li/CMMLU; letters, too
    GAOKAO   a JSON for each file, as its Bench/OBJ_score_evaluation.py reads: https://github.com/OpenLMLab/GAOKAO-Bench

MMLU and MMCU ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onecard.evaluate.json_suites import gaokao_file, gaokao_files, gaokao_subject
from onecard.evaluate.questions import ChoiceSuite

# The columns of CMMLU's leaderboard. Of a category it shows the mean of its subjects.
_CMMLU_COLUMNS = ("STEM", "Humanities", "Social Science", "Other", "China specific")
_NO_ANSWER = "Z"  # what GAOKAO-Bench writes; an empty answer would get half of the points in physics

Rows = Sequence[Mapping[str, Any]]


def submissions(suite: ChoiceSuite, name: str, rows: Rows, model: str) -> dict[str, str]:
    """The files to send by name; none where a benchmark asks for none."""
    name = f"submission_{name.replace('/', '_')}"
    if suite.kind == "gaokao":
        return {f"{name}_{keywords}.json": _json(answers) for keywords, answers in _gaokao(suite, rows, model).items()}
    if suite.kind not in ("ceval", "cmmlu"):
        return {}
    found = {f"{name}.json": _json(_letters(rows))}
    return found | ({f"{name}.md": _cmmlu_row(suite, rows, model)} if suite.kind == "cmmlu" else {})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _letters(rows: Rows) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        _, _, subject, number = row["key"].split("/")
        found.setdefault(subject, {})[number] = row["got"]
    return found


def _cmmlu_row(suite: ChoiceSuite, rows: Rows, model: str) -> str:
    """The heading and a row, in per cent; a column of which a subject was not asked is empty."""
    scores: dict[str, list[bool]] = {}
    for row in rows:
        scores.setdefault(row["key"].split("/")[2], []).append(row["score"] == 1)
    accuracy = {subject: 100 * sum(some) / len(some) for subject, some in scores.items()}
    cells = []
    for column in _CMMLU_COLUMNS:
        subjects = [subject for subject, named in suite.categories.items() if column in named]
        cells.append(_mean([accuracy.get(subject) for subject in subjects]))
    cells.append(_mean([accuracy.get(subject) for subject in suite.categories]))
    heading = f"| Model | {' | '.join(_CMMLU_COLUMNS)} | Average |\n|---|{'---:|' * len(cells)}\n"
    return f"{heading}| {model} | {' | '.join(cells)} |\n"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known and len(known) == len(values) else ""


def _gaokao(suite: ChoiceSuite, rows: Rows, model: str) -> dict[str, dict[str, Any]]:
    """The content of each file, by its keywords; questions of which a part was not asked are left out."""
    by_key = {row["key"]: row for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for file in gaokao_files(suite.path):
        keywords, _, items = gaokao_file(file)
        answered = []
        for number, item in enumerate(items):
            start = f"gaokao/{gaokao_subject(keywords)}/{number}"
            parts = [by_key.get(f"{start}/{k}") for k in range(1, len(item["answer"]) + 1)]
            some = [part for part in parts if part is not None]
            if len(some) < len(parts):
                continue
            rest = {name: value for name, value in item.items() if name != "answer"}
            answered.append({
                "index": number, **rest, "standard_answer": item["answer"],
                "model_answer": [part["got"] or _NO_ANSWER for part in some],
                "model_output": "\n".join(part.get("answer") or part["got"] for part in some),
            })  # fmt: skip
        if answered:
            found[keywords] = {"keywords": keywords, "model_name": model, "example": answered}
    return found
