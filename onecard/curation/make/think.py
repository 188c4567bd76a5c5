"""Thoughts for rows without: the model thinks and answers, and its thought stays where its answer agrees with the row.

The row's own answer is kept behind the thought. Rows that have a thought stay as they are.

Knows prompts, and when answers agree. Does not know HTTP or files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from onecard.config.curation import ThinkOptions
from onecard.curation.make.answers import agrees, prompts, split_thought
from onecard.curation.make.journal import Journal
from onecard.curation.make.run import Asker, MakingTask
from onecard.curation.rows import RecordRow, read_rows
from onecard.data.messages import Conversation
from onecard.data.sources import ReadReport, source_of
from onecard.data.thoughts import has_thought, with_thought


def _thinks(row: RecordRow) -> bool:
    """Whether the last answer has a thought; a document is nothing to think about."""
    if not isinstance(row.sample, Conversation):
        return True
    last = row.sample.turns[-1]
    return bool(last.thought) or has_thought(last.content)


def _can_be_asked(row: RecordRow) -> bool:
    """Whether it is questions and answers alone: calls of tools and preference pairs stay as they are."""
    sample = row.sample
    return (
        isinstance(sample, Conversation)
        and not sample.rejected
        and sample.turns[-1].role == "assistant"
        and all(turn.role in ("system", "user", "assistant") and not turn.tool_calls for turn in sample.turns)
    )


def think_tasks(options: ThinkOptions, journal: Journal) -> Iterator[MakingTask]:
    """A task for each row without a thought that is not done. Raises DataError."""
    for row in read_rows(source_of(options), ReadReport()):
        if not _thinks(row) and _can_be_asked(row) and str(row.place) not in journal.done:
            assert isinstance(row.sample, Conversation)
            yield MakingTask(str(row.place), partial(_ask, options, row.sample))


def _ask(options: ThinkOptions, sample: Conversation, asker: Asker) -> None:
    """Ask until an answer agrees; the entry's row holds the whole conversation."""
    *before, last = sample.turns
    messages = _messages(before)
    messages[-1]["content"] = prompts()[options.prompt_language]["think"].format(question=messages[-1]["content"])
    for answer in asker.answers(messages, options.n_tries):
        thought, given = split_thought(answer.text, answer.thought)
        if not thought:
            asker.entry.problem = "the model wrote no thought"
        elif not answer.is_whole or not given:
            asker.entry.problem = "the answer was cut off; --max_tokens is too small"
        elif not agrees(given, last.content):
            asker.entry.problem = "the answer does not agree with the row's"
        else:
            turns = [*_messages(before), {"role": "assistant", "content": with_thought(thought, last.content)}]
            asker.entry.rows.append({"messages": turns, "provenance": asker.provenance("think")})
            asker.entry.problem = ""
            return


def _messages(turns: list[Any]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.one_text("\n\n")} for turn in turns]


def thought_lines(options: ThinkOptions, journal: Journal) -> Iterator[tuple[bool, str]]:
    """(has a thought, line of JSON) of every usable row, in order: with its new thought, or as it was."""
    made = {entry.key: entry.rows[0] for entry in journal.entries if entry.rows}
    for row in read_rows(source_of(options), ReadReport()):
        if row.sample is None:
            continue
        new = made.get(str(row.place))
        yield (True, json.dumps(new, ensure_ascii=False)) if new else (_thinks(row), row.line())
