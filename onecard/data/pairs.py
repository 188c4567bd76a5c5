"""Preference pairs to token ids: two rows for a record, the prompt with the chosen and with the rejected answer.

Knows which pairs teach a preference. Does not know how records are read (preference.py) nor losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onecard.data.chat_template import Template
from onecard.data.encode import (
    NO_THOUGHT,
    DroppedSample,
    EncodedSample,
    Encoder,
    EncodeSettings,
    Sample,
    SamplePlan,
)
from onecard.data.messages import Conversation, Turn
from onecard.data.preference import CHOSEN_LEARNED

NO_PAIR = "the record is no preference pair (chosen, rejected)"
OTHER_PROMPT = "the two answers of the pair answer different prompts"
EQUAL_ANSWERS = "the two answers of the pair are equal"
TOO_LONG = "an answer of the pair with its prompt is longer than {} tokens (finetune --cutoff_len)"


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
        plans: list[SamplePlan] = []
        for turns in (sample.turns, sample.rejected):
            made = super().plan(replace(sample, turns=_unweighted(turns)))
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


def _unweighted(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A weight scales the loss of tokens; here an answer counts as a whole."""
    return tuple(replace(turn, weight=1.0) for turn in turns)
