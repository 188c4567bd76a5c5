"""One run of making: task after task is asked for and written to the journal, then the rows are written as data.

Writes a folder: journal.jsonl, which makes it resumable, and data.jsonl, anew at the end of each start.

Knows tasks, tokens and prices. Does not know what a task asks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from onecard.console import say, warn
from onecard.curation.make.answers import objects_in
from onecard.curation.make.endpoint import Endpoint, EndpointAnswer
from onecard.curation.make.journal import Journal, JournalEntry
from onecard.export.io.output import new_file

MADE_FILE = "data.jsonl"
_TOLD_EVERY = 10
_TRIES = 3  # answers of the model that are of no use, for one task


class Asker:
    """Asks for one task, and counts what it costs in the task's entry."""

    def __init__(self, endpoint: Endpoint, key: str, model: str) -> None:
        self._endpoint, self._model = endpoint, model
        self.entry = JournalEntry(key)

    def ask(self, messages: list[dict[str, str]]) -> EndpointAnswer:
        """One answer; each further one for the same task has another seed. Raises EndpointError."""
        seed = random.Random(f"{self.entry.key} {self.entry.n_requests}").getrandbits(31)
        answer = self._endpoint.ask(messages, seed)
        self.entry.n_requests += 1
        self.entry.prompt_tokens += answer.prompt_tokens
        self.entry.completion_tokens += answer.completion_tokens
        return answer

    def answers(self, messages: list[dict[str, str]], n: int = _TRIES) -> Iterator[EndpointAnswer]:
        """At most `n` answers, one after another."""
        return (self.ask(messages) for _ in range(n))

    def rows(self, prompt: str, usable: Callable[[dict[str, Any]], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """The usable JSON objects of the first answer that has any; of one cut off in the middle those that are whole.

        Where none has any, the entry says so.
        """
        for answer in self.answers([{"role": "user", "content": prompt}]):
            found = [row for item in objects_in(answer.text) if (row := usable(item)) is not None]
            if found:
                return found
            if answer.is_whole and answer.text.strip().strip("`json \n") == "[]":
                break
        self.entry.problem = f"no usable row in {self.entry.n_requests} answers"
        return []

    def provenance(self, made_by: str, **more: Any) -> dict[str, Any]:
        """What a row says of where it comes from."""
        return {"made_by": made_by, "model": self._model, "task": self.entry.key, **more}


class MakingTask(NamedTuple):
    """A task that is not done yet: its key, and what asks for it and fills the entry's rows."""

    key: str
    work: Callable[[Asker], None]


@dataclass(frozen=True)
class TokenPrices:
    """Prices for a million tokens, in any currency; 0: not told."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In the same currency."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def make(
    endpoint: Endpoint,
    model: str,
    journal: Journal,
    tasks: Iterable[MakingTask],
    prices: TokenPrices,
) -> None:
    """Do every task that is not in the journal yet. Raises EndpointError; what is done stays in the journal."""
    n_before = len(journal.entries)
    if n_before:
        say(f"going on behind {n_before:,} tasks that are done")
    try:
        for task in tasks:
            asker = Asker(endpoint, task.key, model)
            task.work(asker)
            journal.add(asker.entry)
            if (len(journal.entries) - n_before) % _TOLD_EVERY == 0:
                say(state_of(journal, prices))
    finally:
        say(state_of(journal, prices))
        problems = [entry for entry in journal.entries if entry.problem]
        for entry in problems[:5]:
            warn(f"{entry.key}: {entry.problem}")
        if len(problems) > 5:
            warn(f"{len(problems) - 5} more tasks gave no row; the journal names them")


def lines_of(journal: Journal) -> Iterator[str]:
    """Every row that was made, as lines of JSON."""
    return (json.dumps(row, ensure_ascii=False) for row in journal.rows())


def state_of(journal: Journal, prices: TokenPrices) -> str:
    """Tasks, rows, tokens and cost so far, in a line."""
    entries = journal.entries
    n_rows = sum(len(entry.rows) for entry in entries)
    tokens = [sum(entry.prompt_tokens for entry in entries), sum(entry.completion_tokens for entry in entries)]
    n_requests = sum(entry.n_requests for entry in entries)
    line = f"{len(entries):,} tasks, {n_rows:,} rows; {n_requests:,} requests, {tokens[0]:,} + {tokens[1]:,} tokens"
    cost = prices.cost(*tokens)
    return f"{line}, cost {cost:,.4f}" if cost else line


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines as a file that is there whole or not at all; returns how many."""
    n_lines = 0
    with new_file(path, overwrite=True) as partial, partial.open("w", encoding="utf-8", newline="\n") as out:
        for line in lines:
            out.write(line + "\n")
            n_lines += 1
    return n_lines
