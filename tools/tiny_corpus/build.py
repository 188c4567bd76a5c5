"""From the tasks to text: the documents of the base corpus and the rows of the two sample files.

Same seed, same bytes. Knows every task module and no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from . import chat, facts, language, layouts, lists, numbers, prose, reading
from .core import Example, Task, is_held_out

Row = dict[str, str]

Document = tuple[str, str]
"""A text in two parts. The second is the answer to the first, and what comes after it; empty where nothing is asked."""

PROSE_SHARE, STATEMENT_SHARE = 0.04, 0.25
_WIDE = {",": "\uff0c", ":": "\uff1a", "?": "\uff1f", "!": "\uff01", ";": "\uff1b", "(": "\uff08", ")": "\uff09"}
_NARROW_BESIDE_HAN = re.compile(r"(?<=[\u4e00-\u9fff])[,:?!;(]|(?<=\( )\)|(?<=\w),(?=[\u4e00-\u9fff])")


def polish(text: str) -> str:
    """Give Chinese text its full-width punctuation: the tables are typed with the narrow one."""
    return _NARROW_BESIDE_HAN.sub(lambda found: _WIDE[found[0]], text)


def all_tasks() -> list[Task]:
    """Every task of the corpus, in the order of the modules."""
    modules = (facts, language, numbers, lists, reading, chat)
    return [task for module in modules for task in module.tasks()]


def sample_tasks() -> list[Task]:
    """The tasks of the sample files: those that four million parameters come to answer reliably.

    Sums and lists are in the corpus but are not asked: a model of this size gets them right too seldom.
    """
    return [task for module in (facts, language, reading, chat) for task in module.tasks()]


def _document(rng: random.Random, task: Task, example: Example) -> Document:
    """One document: a statement, or a question on a page with its answer and a sentence about something else.

    A held-out fact is never asked. A page that ended with its answer would teach the base to stop there.
    """
    never_asked = task.asked and is_held_out(task, example)
    if never_asked or rng.random() < STATEMENT_SHARE:
        return polish(rng.choice(example.statements)), ""
    return polish(layouts.page(rng, *rng.choice(example.questions))), polish(f"{example.answer}\n{prose.sentence(rng)}")


def documents(seed: int, tasks: Sequence[Task] | None = None) -> Iterator[Document]:
    """Endless documents of the base corpus, about all tasks or about some."""
    rng = random.Random(f"corpus-{seed}")
    tasks = all_tasks() if tasks is None else tasks
    weights = [task.weight for task in tasks]
    forbidden = held_out_inputs()
    while True:
        if rng.random() < PROSE_SHARE:
            yield polish(prose.sentence(rng)), ""
            continue
        task = rng.choices(tasks, weights)[0]
        example = task.draw(rng)
        if not task.knowledge and is_held_out(task, example):
            continue
        text, answer = _document(rng, task, example)
        if not any(held in text for held in forbidden):
            yield text, answer


def held_out_inputs() -> frozenset[str]:
    """Inputs of the held-out file that must be worked out: no document may hold one, not even by chance."""
    computed = {task.name for task in sample_tasks() if not task.knowledge}
    return frozenset(row["input"] for name, row in _held_out_rows() if name in computed)


def _rows(rng: random.Random, task: Task, n_rows: int, held_out: bool) -> list[Row]:
    """Up to `n_rows` different rows of one task on one side of the split; small tables may have fewer."""
    rows: list[Row] = []
    seen: set[str] = set()
    for _ in range(200 * n_rows):
        example = task.draw(rng)
        if len(rows) == n_rows:
            break
        if (task.asked and is_held_out(task, example) != held_out) or example.key in seen:
            continue
        seen.add(example.key)
        instruction, given = rng.choice(_wordings(task, example))
        row = {"instruction": instruction, "input": given, "output": example.answer}
        rows.append({name: polish(text) for name, text in row.items()})
    return rows


def _wordings(task: Task, example: Example) -> tuple[tuple[str, str], ...]:
    """The wordings a row may have: an English word to know something about stands in the question itself.

    Asked with the word in a separate input, the fine-tuned base was right clearly less often (79 % instead of 91 %).
    """
    inline = tuple((instruction, given) for instruction, given in example.rows if not (given and given.isascii()))
    return inline if task.knowledge and inline else example.rows


def _held_out_rows(seed: int = 1, per_task: int = 7) -> list[tuple[str, Row]]:
    rng = random.Random(f"held-out-{seed}")
    asked = [task for task in sample_tasks() if task.asked]
    return [(task.name, row) for task in asked for row in _rows(rng, task, per_task, held_out=True)]


def held_out() -> list[Row]:
    """The rows of `sample/held_out.json`."""
    return [row for _, row in _held_out_rows()]


def merge_sample(seed: int = 1, per_task: int = 32) -> list[Row]:
    """The rows of `sample/merge_sample.json`, shuffled."""
    rng = random.Random(f"merge-{seed}")
    rows = [row for task in sample_tasks() for row in _rows(rng, task, per_task, held_out=False)]
    rng.shuffle(rows)
    return rows
