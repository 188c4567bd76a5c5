"""Answers sampled by a model that is being trained, many at once.

The numbers that are drawn for an answer depend on the seed and the answer's own number, whatever lies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from onecard.config.inference import SamplingOptions
from onecard.data.encode import read_prompt
from onecard.inference.call import GenerateCall, ModelBundle, PromptRow
from onecard.inference.model_limits import go_together


class SampledAnswer(NamedTuple):
    """The ids of an answer with what ended it, its text, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class RolloutSampler:
    """Asks the model of `bundle`, in the mode in which it is."""

    bundle: ModelBundle
    max_tokens: int
    seed: int

    def __call__(self, prompts: Sequence[list[int]], numbers: Sequence[int], temperature: float) -> list[SampledAnswer]:
        """An answer to each prompt of token ids, in one call; temperature 0: the likeliest tokens.

        numbers: of the answers, each its own.
        """
        if not go_together(self.bundle.model, [len(ids) for ids in prompts]):
            return [self([ids], [number], temperature)[0] for ids, number in zip(prompts, numbers, strict=True)]
        sampling = SamplingOptions(temperature=temperature, max_new_tokens=self.max_tokens, seed=self.seed)
        call = GenerateCall(self.bundle, [self._row(*each) for each in zip(prompts, numbers, strict=True)], sampling)
        with torch.no_grad():
            sampled = call.new_ids()
        return [
            SampledAnswer(ids[: answer.n_tokens], answer.text, answer.reason == "stop")
            for ids, answer in zip(sampled, call.answers(sampled), strict=True)
        ]

    def _row(self, ids: list[int], number: int) -> PromptRow:
        prompt = read_prompt(ids, self.bundle.template, self.bundle.tokenizer)
        return PromptRow(ids, self.max_tokens, number, prompt.continues, prompt.lead)
