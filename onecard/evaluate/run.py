"""One evaluation: task after task is answered into a journal, then the report is written from it.

Writes a folder: journal.jsonl, which makes it resumable, answers.jsonl with every record and its score, and the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from onecard.console import few, nearest, say
from onecard.curation.make.journal import Journal, JournalEntry
from onecard.errors import ConfigError, Stopped
from onecard.evaluate.choice import ChoiceTask
from onecard.evaluate.questions import SUITE_FLAG
from onecard.evaluate.report import ANSWERS_FILE, shown
from onecard.inference.call import ModelBundle
from onecard.storage import write_whole

CHOICE_KINDS = ("ceval", "cmmlu", "mmlu", "mmcu", "gaokao")
KINDS = (*CHOICE_KINDS, "open", "extraction", "perplexity", "loss")


class EvaluationTask(Protocol):
    """Something to measure: `items` have a `key`, `work` gives one row for each, which has the key."""

    kind: str
    name: str
    items: Any

    def depends_on(self) -> dict[str, Any]:
        """What the answers depend on, besides the model."""

    def work(self, bundle: ModelBundle, items: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer some of the items."""

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """settings, measures, worst records and notes, from all rows in the order of the items."""


def named_suite(text: str) -> tuple[str, Path]:
    """ "ceval:PATH" -> ("ceval", PATH); "PATH" -> its kind, as far as the file tells. Raises ConfigError."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        kind, rest = "", text
        if (
            colon
            and len(text.partition(":")[0]) > 1
            and not Path(text).exists()
            and Path(text.partition(":")[2]).exists()
        ):
            named = text.partition(":")[0]
            raise ConfigError(SUITE_FLAG, f"{named!r} is none of {', '.join(KINDS)}{nearest(named, KINDS)}")
    path = Path(rest).expanduser()
    if not path.exists():
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ConfigError(SUITE_FLAG, f"there is no file or folder {path}{near}")
    return kind or _kind_of(path), path


def _kind_of(path: Path) -> str:
    """auto for what has the layout of a benchmark, else what the beginning of the file says."""
    if path.is_dir():
        return "auto"
    if path.suffix in (".txt", ".md"):
        return "perplexity"
    with path.open("rb") as stream:
        head = stream.read(65536).decode("utf-8", "replace")
    if '"example"' in head or '"题目"' in head:
        return "auto"
    return "extraction" if r"\"schema\"" in head or '"relation"' in head else "open"


def with_own_names(tasks: Sequence[EvaluationTask]) -> None:
    """Number tasks of the same name: journal and report tell them apart by it."""
    seen: dict[str, int] = {}
    for task in tasks:
        seen[task.name] = seen.get(task.name, 0) + 1
        if seen[task.name] > 1:
            task.name = f"{task.name} ({seen[task.name]})"


def answer(tasks: Sequence[EvaluationTask], bundle: ModelBundle, journal: Journal, batch_size: int) -> None:
    """Answer what is not in the journal yet. Raises Stopped on Ctrl-C: the same command goes on."""
    n_all = sum(len(task.items) for task in tasks)
    n_done = sum(len(entry.rows) for entry in journal.entries)
    if n_done:
        say(f"going on behind {n_done:,} of {n_all:,} records that are done")
    console = Console(stderr=True)
    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    bar = progress.add_task("evaluating", total=n_all, completed=n_done)
    try:
        with progress:
            for task, batch in [(one, batch) for one in tasks for batch in _left(one, journal, batch_size)]:
                journal.add(JournalEntry(f"{task.name}\n{batch[0].key}", task.work(bundle, batch)))
                progress.update(bar, advance=len(batch))
    except KeyboardInterrupt:
        raise Stopped("stopped; what was answered is kept: run the same command again to go on", 130) from None


def _left(task: EvaluationTask, journal: Journal, batch_size: int) -> list[Sequence[Any]]:
    """The items that have no row yet, in batches; the batch size may be another one than before."""
    done = {row["key"] for row in rows_of(task, journal)}
    left = [item for item in task.items if item.key not in done]
    return [left[start : start + batch_size] for start in range(0, len(left), batch_size)]


def rows_of(task: EvaluationTask, journal: Journal) -> list[dict[str, Any]]:
    """The task's rows in the order of its items."""
    entries = [entry for entry in journal.entries if entry.key.partition("\n")[0] == task.name]
    rows = {row["key"]: row for entry in entries for row in entry.rows}
    return [rows[item.key] for item in task.items if item.key in rows]


def write_answers(folder: Path, tasks: Sequence[EvaluationTask], journal: Journal, model: str) -> None:
    """answers.jsonl, and what benchmarks want to be sent, in which the model is called so."""
    lines = []
    for task in tasks:
        rows = rows_of(task, journal)
        lines += [json.dumps({"suite": task.name, **row}, ensure_ascii=False) + "\n" for row in rows]
        if isinstance(task, ChoiceTask):
            for name, text in task.submissions(rows, model).items():
                write_whole(folder / name, text)
    write_whole(folder / ANSWERS_FILE, "".join(lines))


def summary_lines(report: dict[str, Any]) -> list[str]:
    """A line for each suite: its figures in total."""
    lines = []
    for suite in report["suites"]:
        total = suite["measures"][0]
        figures = [f"{name} {shown(value)}" for name, value in total["values"].items()]
        lines.append(f"{suite['name']}: {total['n']:,} records; {few(figures, 12)}")
    return lines
