"""New instructions after the example of a few: Self-Instruct, https://arxiv.org/abs/2212.10560.

Each request shows six of the seed tasks and two that were made, drawn by a function of the seed and the request's
number, so a run that was cut off asks on as if it had not been. An instruction stays whose ROUGE-L with every earlier
one is below the limit.

Knows prompts and novelty. Does not know HTTP or files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from onecard.config.curation import SelfInstructOptions
from onecard.curation.make.answers import prompts, texts_in
from onecard.curation.make.journal import Journal
from onecard.curation.make.novelty import Novelty
from onecard.curation.make.run import Asker, MakingTask
from onecard.curation.words import words_of
from onecard.data.messages import Conversation
from onecard.data.sources import ReadReport, Source, read, source_of
from onecard.errors import DataError

_SHOWN_SEEDS, _SHOWN_MADE = 6, 2  # as in the paper
_MIN_WORDS, _MAX_WORDS = 3, 150  # the same
_MOST_DRY = 20  # requests in a row without a new row


def seed_tasks(source: Source) -> list[dict[str, str]]:
    """The first question and answer of each conversation. Raises DataError where there is none."""
    found = []
    for sample in read(source, report=ReadReport()):
        turns = [turn for turn in sample.turns if turn.role != "system"] if isinstance(sample, Conversation) else []
        if [turn.role for turn in turns[:2]] == ["user", "assistant"] and turns[1].content:
            found.append({"instruction": turns[0].content, "input": turns[0].input, "output": turns[1].content})
    if not found:
        raise DataError("no seed task: questions with answers are needed, and only texts are there", source.name)
    return found


class SelfInstruct:
    """The requests that are still to be made, one after another."""

    def __init__(self, options: SelfInstructOptions, journal: Journal) -> None:
        self._options, self._journal = options, journal
        self._seeds = seed_tasks(source_of(options))
        self._made: list[dict[str, Any]] = list(journal.rows())
        self._known = Novelty()
        for task in [*self._seeds, *self._made]:
            self._known.add(task["instruction"])

    def tasks(self) -> Iterator[MakingTask]:
        """Requests until enough rows are there. Raises DataError after twenty in a row without a new one."""
        number = len(self._journal.entries)
        while len(self._made) < self._options.n_rows:
            dry = [not entry.rows for entry in self._journal.entries[-_MOST_DRY:]]
            if len(dry) == _MOST_DRY and all(dry):
                raise DataError(
                    f"the last {_MOST_DRY} requests gave nothing new: {len(self._made):,} of {self._options.n_rows:,} "
                    "rows are made; give more seed tasks, a higher --novelty or --temperature"
                )
            yield MakingTask(f"request {number}", self._ask)
            number += 1

    def _ask(self, asker: Asker) -> None:
        draw = random.Random(f"{self._options.seed} {asker.entry.key}")
        shown = draw.sample(self._seeds, min(_SHOWN_SEEDS, len(self._seeds)))
        shown += draw.sample(self._made, min(_SHOWN_MADE, len(self._made)))
        examples = [{key: task[key] for key in ("instruction", "input", "output")} for task in shown]
        prompt = prompts()[self._options.prompt_language]["self_instruct"].format(
            n_examples=len(examples),
            n_new=self._options.n_per_request,
            examples="\n".join(json.dumps(example, ensure_ascii=False) for example in examples),
        )
        for row in asker.rows(prompt, _usable):
            if len(self._made) == self._options.n_rows:
                break
            likeness = self._known.nearest(row["instruction"], self._options.novelty)
            if likeness < self._options.novelty:
                self._known.add(row["instruction"])
                row["provenance"] = asker.provenance("self-instruct", nearest=round(likeness, 3))
                asker.entry.rows.append(row)
                self._made.append(row)
        if not asker.entry.rows and not asker.entry.problem:
            asker.entry.problem = "every instruction was like an earlier one"


def _usable(item: dict[str, Any]) -> dict[str, Any] | None:
    instruction, context, output = texts_in(item, "instruction", "input", "output")
    long_enough = _MIN_WORDS <= len(words_of(instruction)) <= _MAX_WORDS
    return {"instruction": instruction, "input": context, "output": output} if long_enough and output else None
