"""A judge over an OpenAI-compatible endpoint: answers graded from 0 to 10, beside their reference in both orders.

Where there is a reference the judge sees both answers without being told which is whose, once in each order; the grade
is the mean of the two, and what an answer gains by standing second is reported. Every raw grading stays in the journal
of the folder `judge`, by which a judge that went away is asked on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from onecard.curation.make.answers import objects_in
from onecard.curation.make.journal import Journal
from onecard.curation.make.run import Asker, MakingTask
from onecard.data.wordings import language_of
from onecard.evaluate.measures import Measure, share
from onecard.evaluate.open_answers import OpenQuestion, OpenTask
from onecard.statistics import mean_interval

JUDGE_FOLDER = "judge"
_TRIES = 3  # gradings that cannot be read, for one answer


@lru_cache(maxsize=1)
def _prompts() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("judge_prompts.yaml").read_text(encoding="utf-8"))
    return found


def criteria_of(kind: str, language: str) -> str:
    """What counts for a class of questions; for a class without criteria of its own the general ones."""
    known = _prompts()[language]["criteria"]
    return str(known.get(kind.strip().lower().replace("_", " "), known["general"]))


def judge_prompt(question: OpenQuestion, answers: Sequence[str]) -> str:
    """What the judge is asked: the question, one answer or two in this order, and what counts."""
    texts = _prompts()[language_of(question.text)]
    listed = "\n\n".join(f"[{texts['answer']} {k}]\n{text}" for k, text in enumerate(answers, start=1))
    form = ", ".join(f'"{k}": {texts["grade"]}' for k in range(1, len(answers) + 1))
    criteria = criteria_of(question.kind, language_of(question.text))
    return str(texts["prompt"]).format(question=question.text, answers=listed, criteria=criteria, form="{" + form + "}")


def grades_in(text: str, n: int) -> list[float] | None:
    """The grades in a judge's answer, the last object that has all of them; None where there is none."""
    for item in reversed(list(objects_in(text))):
        values = [item.get(str(k)) for k in range(1, n + 1)]
        grades = [_number(value) for value in values]
        if all(grade is not None and 0 <= grade <= 10 for grade in grades):
            return [grade for grade in grades if grade is not None]
    return None


def _number(value: Any) -> float | None:
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def judge_tasks(tasks: Sequence[OpenTask], rows: dict[str, dict[str, str]], journal: Journal) -> Iterator[MakingTask]:
    """What the judge is still to be asked. rows: by task and key, the answers of the model."""
    for task, question in [(one, question) for one in tasks for question in one.items]:
        for order in ("reference first", "own first") if question.reference else ("own",):
            key = f"{task.name} {question.key} {order}"
            if key not in journal.done:
                yield MakingTask(key, _grading(question, rows[task.name][question.key], order))


def _grading(question: OpenQuestion, answer: str, order: str) -> Any:
    answers = {"own": [answer], "reference first": [question.reference, answer]}.get(
        order, [answer, question.reference]
    )

    def work(asker: Asker) -> None:
        messages = [{"role": "user", "content": judge_prompt(question, answers)}]
        raw = []
        for reply in asker.answers(messages, _TRIES):
            raw.append(reply.text)
            grades = grades_in(reply.text, len(answers))
            if grades is not None:
                asker.entry.rows.append({"grades": grades, "raw": reply.text})
                return
        asker.entry.rows += [{"grades": None, "raw": text} for text in raw]
        asker.entry.problem = f"no grades in {len(raw)} answers of the judge"

    return work


def judged_measures(task: OpenTask, journal: Journal, seed: int) -> list[Measure]:
    """Grades in total and by class, with intervals over questions."""
    grades = {entry.key: entry.rows[-1]["grades"] for entry in journal.entries if entry.rows}
    classes: dict[str, list[dict[str, float] | None]] = {"": []}
    for question in task.items:
        one = _joined(task.name, question, grades)
        for kind in ("", question.kind) if question.kind else ("",):
            classes.setdefault(kind, []).append(one)
    measures = []
    for kind, some in classes.items():
        known = [one for one in some if one is not None]
        values: dict[str, Any] = {"ungraded": len(some) - len(known)}
        if known:
            values["grade"] = mean_interval([one["grade"] for one in known], seed=seed)
        compared = [one for one in known if "reference" in one]
        if compared:
            values["reference_grade"] = mean_interval([one["reference"] for one in compared], seed=seed)
            n_better = sum((one["wins"] + 2) / 4 for one in compared)  # a tie, or each order another way, counts half
            values["preferred"] = share(n_better, len(compared))
            values["order_effect"] = mean_interval([one["second"] for one in compared], seed=seed)
        measures.append(Measure("class" if kind else "total", kind, len(some), values))
    return measures


def _joined(task: str, question: OpenQuestion, grades: dict[str, Any]) -> dict[str, float] | None:
    """One question's grades over both orders; None where the judge gave none."""
    if not question.reference:
        own = grades.get(f"{task} {question.key} own")
        return {"grade": own[0]} if own else None
    second, first = (grades.get(f"{task} {question.key} {order}") for order in ("reference first", "own first"))
    if not second or not first:
        return None
    own, reference = [second[1], first[0]], [second[0], first[1]]
    wins = sum((a > b) - (a < b) for a, b in zip(own, reference, strict=True))
    return {"grade": sum(own) / 2, "reference": sum(reference) / 2, "wins": wins, "second": own[0] - own[1]}
