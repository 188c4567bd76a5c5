"""Prompts whose answers are sampled while training: the question of a record, and what its answer is judged by.

Knows which part of a record is asked and which is kept for a reward. Does not know rewards nor models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from onecard.data.columns import Columns, renamed
from onecard.data.encode import DroppedSample, EncodedSample, Encoder, Sample, SamplePlan
from onecard.data.formats import ANSWERS, ParsedRecord, to_sample
from onecard.data.json_records import plain_value
from onecard.data.messages import Conversation
from onecard.data.preference import chosen_side
from onecard.data.questions import Question, to_question
from onecard.data.values import UnusableRecord
from onecard.errors import DataError

TOO_LONG = "the prompt is longer than {} tokens (finetune --cutoff_len less --rollout_max_tokens)"


def to_prompt(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
    """The question in one parsed record, with fields {"prompt", "reference", "row"}. Raises UnusableRecord.

    {"instruction": "Add", "input": "2 3", "output": "5"}
        -> user "Add" with input "2 3", prompt "Add\\n2 3", reference "5", row: the record
    reference: the recorded answer, None where there is none.
    """
    parsed = to_question(value, record, columns)
    asked = parsed.sample.turns  # type: ignore[union-attr]
    reference = None
    try:
        sample = to_sample(chosen_side(renamed(value, columns), ANSWERS), record).sample
        if isinstance(sample, Conversation) and len(sample.turns) > len(asked):
            reference = sample.turns[-1].content
    except UnusableRecord:
        pass  # a record without an answer
    prompt = "\n".join(filter(None, (asked[-1].content, asked[-1].input)))
    kept = {"prompt": prompt, "reference": reference, "row": value}
    parsed.sample = Question(asked, record, fields=kept)
    parsed.ignored = []  # a reward may read all of them
    return parsed


class PromptEncoder(Encoder):
    """One row for each record: what generation feeds the model, of which nothing is learned, and the fields."""

    @staticmethod
    def reads(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
        return to_prompt(value, record, columns)

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        assert isinstance(sample, Question)  # `to_prompt` makes nothing else
        turns = self._with_thinking(sample.turns)
        if bad := self._fault_of(turns):
            return DroppedSample(bad, bad=True)
        try:
            segments = self.writer.segments(turns, add_generation_prompt=True)
        except DataError as reason:
            return DroppedSample(str(reason), bad=True)
        fields = json.dumps(plain_value(sample.fields))
        return [SamplePlan(turns, segments, learn_last=True, fields=fields)]

    def _assemble(self, plan: list[SamplePlan], ids: Iterator[list[list[int]]]) -> list[EncodedSample] | DroppedSample:
        (draft,) = plan
        prompt = self._join(draft, next(ids)).ids
        if len(prompt) > self.settings.cutoff_len:
            return DroppedSample(TOO_LONG.format(self.settings.cutoff_len))
        return [EncodedSample(prompt, [], fields=draft.fields)]
