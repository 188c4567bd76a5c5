"""The best of several answers to each question, and preference pairs of the best and the worst.

Every question is first answered `n` times into a file beside the output, by `run.py`; then, with that model out of
memory, the answers are judged in order. Both files go on where a start was cut off. Pairs are made of them at the end.

    answers.jsonl                 a line per question: its fields, `output` (the best), `reward` and all `rewards`
    answers.jsonl.samples.jsonl   `n` lines per question
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from onecard.console import say, warn
from onecard.data.messages import Turn, turns_to_messages
from onecard.data.prompts import to_prompt
from onecard.data.questions import Question
from onecard.data.sources import ReadReport, Source, read
from onecard.inference.batch.results import AnswerFile, as_line
from onecard.inference.batch.run import with_system
from onecard.objectives.rewards import Answer, Rewards
from onecard.storage import write_whole

WINDOW = 32  # questions judged at once


class JudgedAnswers(NamedTuple):
    """The sampled answers to a question, with the reward of each; None: it has none."""

    question: Question
    samples: list[dict[str, Any]]
    rewards: list[float | None]


Judge = Callable[[Sequence[Question], Sequence[list[str]]], list[list[float | None]]]


@dataclass(frozen=True)
class BestOfJob:
    """What is judged: the questions, `n` sampled answers to each in a file; system: of questions without one."""

    source: Source
    samples: Path
    n: int
    system: str = ""

    def judged(self, judge: Judge, first: int) -> Iterator[list[JudgedAnswers]]:
        """The questions from number `first` on with their answers' rewards, some at a time."""
        questions = (sample for sample in read(self.source, report=ReadReport(), shape=to_prompt))
        with self.samples.open(encoding="utf-8") as stream:
            lines = islice(stream, first * self.n, None)
            remaining = islice(questions, first, None)
            while window := [each for each in islice(remaining, WINDOW) if isinstance(each, Question)]:
                rows = [[json.loads(line) for line in islice(lines, self.n)] for _ in window]
                rewards = judge(window, [[row["output"] for row in some] for some in rows])
                yield [JudgedAnswers(*each) for each in zip(window, rows, rewards, strict=True)]


def judge_by_checkers(checkers: Rewards) -> Judge:
    """Rewards by checkers and the function of --reward_file. It raises RewardError and DataError by the record."""

    def judge(questions: Sequence[Question], answers: Sequence[list[str]]) -> list[list[float | None]]:
        return [
            [None if text is None else checkers.of(Answer(text, asked.fields, asked.record))[0] for text in texts]
            for asked, texts in zip(questions, answers, strict=True)
        ]

    return judge


def judge_by_model(rewards: Callable[[list[tuple[tuple[Turn, ...], str]]], list[float | None]], system: str) -> Judge:
    """Rewards by a reward model, which reads what the answering model was asked."""

    def judge(questions: Sequence[Question], answers: Sequence[list[str]]) -> list[list[float | None]]:
        asked = [(with_system(each.turns, system), text or "") for each, texts in zip(questions, answers, strict=True)
                 for text in texts]  # fmt: skip
        found = iter(rewards(asked))
        return [[None if text is None else next_reward for text, next_reward in zip(texts, islice(found, len(texts)),
                strict=True)] for texts in answers]  # fmt: skip

    return judge


def write_best(job: BestOfJob, judge: Judge, answers: AnswerFile) -> None:
    """Write the best answer to each question that has none yet, of equal ones the first."""
    for window in job.judged(judge, answers.n_done):
        answers.append([_best_row(each) for each in window])


def _best_row(judged: JudgedAnswers) -> dict[str, Any]:
    row, given = judged.samples[0], [reward for reward in judged.rewards if reward is not None]
    best = max(given, default=None)
    if best is not None:
        row = judged.samples[judged.rewards.index(best)]
    return row | {"reward": best, "rewards": judged.rewards}


def write_pairs(job: BestOfJob, answers: Path, pairs: Path, margin: float) -> None:
    """Write a pair of the best and the worst whole answer to each question; how many have none, and why, is said.

    Answers that were cut off are in no pair: their end would be learned.
    """

    def known(questions: Sequence[Question], _answers: Sequence[list[str]]) -> list[list[float | None]]:
        return [json.loads(line)["rewards"] for line in islice(lines, len(questions))]

    found: list[bytes] = []
    n_questions = 0
    with answers.open(encoding="utf-8") as lines:
        for judged in (each for window in job.judged(known, 0) for each in window):
            n_questions += 1
            whole = [
                (reward, row["output"])
                for row, reward in zip(judged.samples, judged.rewards, strict=True)
                if reward is not None and row["finish_reason"] != "length"
            ]
            best, worst = (pick(whole, key=lambda each: each[0], default=(0.0, "")) for pick in (max, min))
            if best[0] - worst[0] >= margin and best[0] > worst[0]:
                found.append(as_line(_pair(with_system(judged.question.turns, job.system), best, worst)))
    write_whole(pairs, b"".join(found))
    say(f"{len(found)} preference pairs are in {pairs}")
    if n_questions > len(found):
        limit = f", or less than --pair_margin {margin:g} apart" if margin else ""
        n_others = n_questions - len(found)
        warn(f"{n_others} questions give no pair: the rewards of answers that were not cut off are equal{limit}")


def _pair(turns: tuple[Turn, ...], best: tuple[float, str], worst: tuple[float, str]) -> dict[str, Any]:
    rewards = {"chosen_reward": best[0], "rejected_reward": worst[0]}
    if len(turns) == 1 and turns[0].input:  # which messages have no place for
        asked: dict[str, Any] = {"instruction": turns[0].content, "input": turns[0].input}
        return {**asked, "chosen": best[1], "rejected": worst[1], **rewards}
    prompt = turns_to_messages(tuple(replace(t, content="\n".join(filter(None, (t.content, t.input))), input="")
                                     for t in turns))  # fmt: skip
    sides = {
        key: [{"role": "assistant", "content": text}] for key, text in (("chosen", best[1]), ("rejected", worst[1]))
    }
    return {"prompt": prompt, **sides, **rewards}
