"""A file of questions to a file of answers: batched, in order, and going on after a kill where it stopped.

Questions pass in windows of some batches. Within a window they are sorted by length, so that little of a batch is
padding; written they are in the order of the file. A later start cuts the same windows into the same batches, so it
writes the answers that an undisturbed run would have written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from onecard.config.inference import SamplingOptions
from onecard.console import say, warn
from onecard.data.messages import Turn
from onecard.data.questions import Question, read_questions
from onecard.data.sources import ReadReport, Source
from onecard.errors import ConfigError, DataError, ModelError, Stopped
from onecard.inference.batch.results import BEST_OF_FIELDS, OWN_FIELDS, AnswerFile, answer_row
from onecard.inference.call import ModelBundle, PromptRow
from onecard.inference.generate import Generation, answer_rows, prepare
from onecard.inference.grammar import AnswerGrammar
from onecard.installation import command
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory

WINDOW_BATCHES = 8
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class BatchReport:
    """What was done in this start."""

    n_answers: int = 0
    n_errors: int = 0
    n_cut: int = 0
    n_new_tokens: int = 0
    seconds: float = 0.0
    _begun: float = field(default_factory=time.perf_counter)

    def count(self, generation: Generation) -> None:
        self.n_new_tokens += generation.n_new_tokens
        self.n_cut += generation.finish_reason == "length"
        self.seconds = time.perf_counter() - self._begun

    def line(self) -> str:
        speed = self.n_new_tokens / self.seconds if self.seconds else 0.0
        return f"{self.n_answers} answers, {self.n_new_tokens:,} tokens, {speed:.1f} tokens/s"


@dataclass(frozen=True)
class BatchJob:
    """Who answers which questions, and how. `system` goes before questions without a system text of their own.
    samples: answers to each question, one after another."""

    bundle: ModelBundle
    source: Source
    n_questions: int  # as `survey` counted
    sampling: SamplingOptions
    batch_size: int
    system: str = ""
    samples: int = 1
    grammar: AnswerGrammar | None = None

    @property
    def n_answers(self) -> int:
        return self.n_questions * self.samples

    @property
    def own_fields(self) -> tuple[str, ...]:
        """The names of fields that are no question's."""
        return OWN_FIELDS if self.samples == 1 else OWN_FIELDS + BEST_OF_FIELDS


def survey(source: Source) -> int:
    """Read the questions once, before a model is loaded: how many there are; what was skipped is said.

    Raises DataError when there are none.
    """
    report = ReadReport()
    n_questions = sum(1 for _ in read_questions(source, report=report))
    for line in report.summary_lines():
        say(line)
    return n_questions


def answer_questions(job: BatchJob, answers: AnswerFile) -> BatchReport:
    """Answer what is not yet answered in `answers`.

    A question that cannot be asked (too long a prompt) gets a line with `output` null and an `error`.
    Raises Stopped with 130 on Ctrl-C: everything written stays, and the same command goes on.
    """
    if answers.n_done > job.n_answers:
        raise ConfigError("--output_path", f"{answers.path} has {answers.n_done} lines for {job.n_answers} answers")
    tally = BatchReport()
    console = Console(stderr=True)
    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    bar = progress.add_task("answering", total=job.n_answers, completed=answers.n_done)
    try:
        with progress:
            for rows in _finished_rows(job, answers.n_done, tally):
                answers.append(rows)
                progress.update(bar, completed=answers.n_done)
    except KeyboardInterrupt:
        done = f"stopped with {answers.n_done} of {job.n_answers} answers in {answers.path}"
        raise Stopped(f"{done}; run the same command again to go on", 130) from None
    if tally.n_errors:
        warn(f"{tally.n_errors} questions could not be asked; their lines say why under `error`")
    if tally.n_cut:
        warn(f"{tally.n_cut} answers were cut at --max_new_tokens {job.sampling.max_new_tokens} or the model's limit")
    return tally


def in_halves(work: Callable[[Sequence[T]], list[R]], items: Sequence[T], too_large: Callable[[T], str]) -> list[R]:
    """What the work makes of the items, in halves when they do not fit into the card's memory together.

    Raises ModelError with the words of `too_large` when one alone does not fit.
    """
    try:
        return work(items)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        if len(items) == 1:
            raise ModelError(too_large(items[0])) from reason
    give_back_memory()
    middle = len(items) // 2
    return in_halves(work, items[:middle], too_large) + in_halves(work, items[middle:], too_large)


def answer_safely(bundle: ModelBundle, rows: Sequence[PromptRow], sampling: SamplingOptions) -> list[Generation]:
    """Answer rows, in halves when they do not fit into the card's memory together. Raises ModelError."""

    def too_large(row: PromptRow) -> str:
        return (
            f"a question of {len(row.ids)} tokens with an answer of up to {row.max_new_tokens} does not fit into "
            f"memory; use fewer --bits or, in {command('generate')}, a smaller --max_new_tokens or --num_beams"
        )

    return in_halves(lambda some: answer_rows(bundle, some, sampling), rows, too_large)


def _finished_rows(job: BatchJob, n_done: int, tally: BatchReport) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows to be written, in the order of the file, from question number `n_done` on."""
    size = job.batch_size * WINDOW_BATCHES
    first = n_done - n_done % size
    each = read_questions(job.source, report=ReadReport())
    questions = islice((question for question in each for _ in range(job.samples)), first, None)
    while window := list(islice(questions, size)):
        yield from _answer_window(job, window, first, max(n_done, first), tally)
        first += len(window)


def _answer_window(
    job: BatchJob, window: list[Question], first: int, next_number: int, tally: BatchReport
) -> Iterator[list[dict[str, Any]]]:
    """The window's rows from `next_number` on, each as soon as nothing before it is missing.

    first: the number of the window's first question in the file, from 0.
    """
    finished: dict[int, dict[str, Any]] = {}
    prepared: list[PromptRow] = []
    n_done = next_number
    for number, question in enumerate(window, start=first):
        try:
            turns = with_system(question.turns, job.system)
            prepared.append(prepare(job.bundle, turns, job.sampling, number=number, grammar=job.grammar))
        except DataError as reason:
            finished[number] = answer_row(question.fields, None, "error", str(reason), own=job.own_fields)
            tally.n_errors += number >= n_done
    # The longest first: what does not fit into memory shows at once. The number makes the order the same every time.
    prepared.sort(key=lambda row: (-len(row.ids), row.number))
    batches = [prepared[start : start + job.batch_size] for start in range(0, len(prepared), job.batch_size)]
    for batch in [*batches, []]:  # the empty one lets out a window in which nothing could be asked
        if batch and all(row.number < n_done for row in batch):
            continue
        for row, generation in zip(batch, answer_safely(job.bundle, batch, job.sampling), strict=True):
            fields = window[row.number - first].fields
            finished[row.number] = answer_row(fields, generation.text, generation.finish_reason, own=job.own_fields)
            tally.count(generation)
        ready = []
        while next_number in finished:
            ready.append(finished.pop(next_number))
            next_number += 1
        tally.n_answers += len(ready)
        yield ready


def with_system(turns: Sequence[Turn], system: str) -> tuple[Turn, ...]:
    """The turns with this system text in front, unless they have one."""
    if not system or turns[0].role == "system":
        return tuple(turns)
    return (Turn("system", system), *turns)
