"""Preferences to token ids: two rows for a pair, the prompt with the chosen and with the rejected answer; for an answer
that is marked good or bad, one.

Knows which records teach a preference. Does not know how records are read (preference.py) nor losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onecard.data.chat_template import Template
from onecard.data.columns import Columns, renamed
from onecard.data.encode import (
    NO_THOUGHT,
    DroppedSample,
    EncodedSample,
    Encoder,
    EncodeSettings,
    Sample,
    SamplePlan,
)
from onecard.data.formats import ParsedRecord, to_sample
from onecard.data.learn_marks import NOT_A_GOOD_ANSWER
from onecard.data.messages import Conversation, Turn
from onecard.data.preference import CHOSEN_LEARNED
from onecard.data.values import UnusableRecord

NO_PAIR = "the record is no preference pair (chosen, rejected)"
OTHER_PROMPT = "the two answers of the pair answer different prompts"
EQUAL_ANSWERS = "the two answers of the pair are equal"
TOO_LONG = "an answer of the pair with its prompt is longer than {} tokens (finetune --cutoff_len)"

NO_LABEL = "the record says neither that its answer is good nor that it is bad (label: true, label: false)"
TOO_LONG_ANSWER = "the answer with its prompt is longer than {} tokens (finetune --cutoff_len)"


class PairEncoder(Encoder):
    """Two rows side by side for each record; of each the last answer is learned. Nothing is cut: that would make
    another prompt, or an answer that was never compared."""

    untrue_notes = frozenset({CHOSEN_LEARNED})

    def __init__(self, template: Template, tokenizer: Any, settings: EncodeSettings) -> None:
        super().__init__(template, tokenizer, replace(settings, train_on="last"))

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        if not isinstance(sample, Conversation) or not sample.rejected:
            return DroppedSample(NO_PAIR)
        if sample.turns[:-1] != sample.rejected[:-1]:
            return DroppedSample(OTHER_PROMPT)
        return self._plans(sample, [_weighted(sample.turns), _weighted(sample.rejected)])

    def _plans(self, sample: Conversation, answers: list[tuple[Turn, ...]]) -> list[SamplePlan] | DroppedSample:
        """A plan for each of these answers, which each end their turns."""
        plans: list[SamplePlan] = []
        for turns in answers:
            made = super().plan(replace(sample, turns=turns))
            if isinstance(made, DroppedSample):
                return made
            if len(made[0].turns) < len(turns):
                return DroppedSample(NO_THOUGHT)  # of this answer; an earlier one would be learned in its place
            plans += made
        return plans

    def _assemble(self, plan: list[SamplePlan], ids: Iterator[list[list[int]]]) -> list[EncodedSample] | DroppedSample:
        chosen, rejected = (self._join(draft, next(ids)) for draft in plan)
        if chosen.ids == rejected.ids:
            return DroppedSample(EQUAL_ANSWERS)
        if max(len(chosen.ids), len(rejected.ids)) > self.settings.cutoff_len:
            return DroppedSample(TOO_LONG.format(self.settings.cutoff_len))
        if not chosen.spans or not rejected.spans:
            return DroppedSample("nothing to learn")
        return [chosen, rejected]


class RatedPairEncoder(PairEncoder):
    """Pairs with the field "margin" where they have one; it is kept beside the chosen answer."""

    @staticmethod
    def reads(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
        parsed = to_sample(value, record, columns)
        margin = renamed(value, columns).get("margin")
        if margin is None or not isinstance(parsed.sample, Conversation):
            return parsed
        try:
            number = float(margin)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UnusableRecord('"margin" is no number: by how much the chosen answer is better')
        parsed.sample = replace(parsed.sample, margin=number)
        parsed.ignored = [key for key in parsed.ignored if key != "margin"]
        return parsed

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        plans = super().plan(sample)
        if isinstance(plans, DroppedSample) or not isinstance(sample, Conversation) or not sample.margin:
            return plans
        return [plans[0]._replace(fields=json.dumps(sample.margin)), *plans[1:]]

    def _assemble(self, plan: list[SamplePlan], ids: Iterator[list[list[int]]]) -> list[EncodedSample] | DroppedSample:
        made = super()._assemble(plan, ids)
        return made if isinstance(made, DroppedSample) else [made[0]._replace(fields=plan[0].fields), *made[1:]]


class GoodOrBadEncoder(PairEncoder):
    """A row for each answer that is marked good or bad; the tokens of a bad one weigh -1. Of a pair each answer is one.
    Nothing is cut here either."""

    untrue_notes = frozenset({CHOSEN_LEARNED, NOT_A_GOOD_ANSWER})

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        if not isinstance(sample, Conversation) or (sample.label is None and not sample.rejected):
            return DroppedSample(NO_LABEL)
        if sample.label is None:
            return self._plans(sample, [_weighted(sample.turns), _weighted(sample.rejected, -1.0)])
        # A record of a bad answer is marked as not to be learned, too.
        turns = sample.turns if sample.label else tuple(replace(turn, learn=True) for turn in sample.turns)
        return self._plans(sample, [_weighted(turns, 1.0 if sample.label else -1.0)])

    def _assemble(self, plan: list[SamplePlan], ids: Iterator[list[list[int]]]) -> list[EncodedSample] | DroppedSample:
        coded = [self._join(draft, next(ids)) for draft in plan]
        if max(len(each.ids) for each in coded) > self.settings.cutoff_len:
            return DroppedSample(TOO_LONG_ANSWER.format(self.settings.cutoff_len))
        return coded if all(each.spans for each in coded) else DroppedSample("nothing to learn")


def _weighted(turns: tuple[Turn, ...], weight: float = 1.0) -> tuple[Turn, ...]:
    """Weights of the data scale the loss of tokens; here an answer counts as a whole."""
    return tuple(replace(turn, weight=weight) for turn in turns)
