"""The tasks that suites are measured by, and their answers as parts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onecard.config.evaluation import EvaluateOptions
from onecard.config.parsing import comma_list
from onecard.curation.make.journal import Journal
from onecard.evaluate.answer_loss import AnswerLossTask
from onecard.evaluate.choice import ChoiceSettings, ChoiceTask
from onecard.evaluate.extraction import ExtractionTask
from onecard.evaluate.open_answers import OpenTask
from onecard.evaluate.perplexity import PerplexityTask
from onecard.evaluate.run import EvaluationTask, answer, named_suite, rows_of, with_own_names, write_answers
from onecard.evaluate.suites import load_choice_suite
from onecard.inference.call import ModelBundle


def tasks_of(options: EvaluateOptions, is_chat: bool) -> list[EvaluationTask]:
    """The tasks of suites such as "ceval:PATH", read from their files. Raises ConfigError and DataError."""
    tasks: list[EvaluationTask] = []
    for text in options.suites:
        kind, path = named_suite(text)
        longest = options.max_new_tokens or 512
        if kind == "open":
            tasks.append(OpenTask(path, max_new_tokens=longest, seed=options.seed, limit=options.limit))
        elif kind == "extraction":
            tasks.append(ExtractionTask(path, max_new_tokens=longest, limit=options.limit))
        elif kind == "perplexity":
            tasks.append(PerplexityTask(path, window=options.window, stride=options.stride, limit=options.limit))
        elif kind == "loss":
            tasks.append(AnswerLossTask(path, seed=options.seed, limit=options.limit))
        else:
            suite = load_choice_suite(kind, path, split=options.split, subjects=comma_list(options.subjects))
            settings = ChoiceSettings(
                options.method, is_chat, options.shots, options.cot, options.max_new_tokens, options.seed
            )
            task = ChoiceTask(suite, settings)
            task.items = task.items[: options.limit or None]
            tasks.append(task)
    with_own_names(tasks)
    return tasks


def answered(
    folder: Path, tasks: Sequence[EvaluationTask], bundle: ModelBundle, journal: Journal, batch_size: int, model: str
) -> list[dict[str, Any]]:
    """Answer what the journal lacks, write what `write_answers` does, and give the report's part of each suite."""
    answer(tasks, bundle, journal, batch_size)
    write_answers(folder, tasks, journal, model)
    return [{"name": task.name, "kind": task.kind, **task.report(rows_of(task, journal))} for task in tasks]
