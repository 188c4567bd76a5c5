"""How well a model answers questions whose answers are known: loss per supervised token, and exact match.

Loss is what training measures, on the same ids and labels. Exact match lets the model answer greedily, and counts an
answer that equals the reference, blanks around both aside. Does not know tables or where the questions are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onecard.config.inference import SamplingOptions
from onecard.data.batches import micro_batches
from onecard.data.encode import IGNORE_INDEX, DroppedSample, EncodeSettings, LabelledSample, encode_sample, prompt_for
from onecard.data.messages import Conversation
from onecard.data.sources import ReadReport, Source, read
from onecard.errors import DataError
from onecard.inference.batch.run import answer_safely
from onecard.inference.call import ModelBundle, PromptRow
from onecard.inference.generate import longest_sequence
from onecard.objectives.registry import of_answers

# An answer may be right in other tokens than the reference's; beyond this many it is wrong already.
SPARE_TOKENS = 16
MICRO_TOKENS = 4096
UNLIMITED = 2**20  # tokens; for a model whose config sets no limit


@dataclass(frozen=True)
class Case:
    """A question with its known answer: the conversation, its training sample, and the row that asks for the answer."""

    conversation: Conversation
    sample: LabelledSample
    row: PromptRow

    @property
    def reference(self) -> str:
        return self.conversation.turns[-1].content


@dataclass(frozen=True)
class Score:
    """`loss` in nats per supervised token, `exact_match` from 0 to 1, and the model's answers in order."""

    loss: float
    exact_match: float
    answers: list[str]


def read_cases(source: str | Source, bundle: ModelBundle, *, limit: int = 0) -> list[Case]:
    """The questions of a file with their answers, encoded; `limit` takes the first ones only, 0 all.

    Raises DataError when there is none.
    """
    longest = longest_sequence(bundle.model) or UNLIMITED
    settings = EncodeSettings(cutoff_len=longest, train_on="last")
    cases: list[Case] = []
    encoder = of_answers(bundle.objective).encoder
    for sample in read(source, report=ReadReport()):
        if limit and len(cases) == limit:
            break
        if not isinstance(sample, Conversation) or not sample.turns[-1].learn:  # a bad answer is no reference
            continue
        encoded = encode_sample(sample, bundle.template, bundle.tokenizer, settings, encoder=encoder)
        if isinstance(encoded, DroppedSample) or encoded[0].cut:
            continue
        prompt = prompt_for(sample.turns[:-1], bundle.template, bundle.tokenizer)
        n_answer = sum(label != IGNORE_INDEX for label in encoded[0].labels)
        max_new_tokens = min(2 * n_answer + SPARE_TOKENS, longest - len(prompt.ids))
        row = PromptRow(prompt.ids, max_new_tokens, len(cases), prompt.continues, prompt.lead)
        cases.append(Case(sample, encoded[0], row))
    if not cases:
        raise DataError(
            "no question with an answer that fits into the model", source if isinstance(source, str) else source.name
        )
    return cases


def score(bundle: ModelBundle, cases: Sequence[Case], *, batch_size: int) -> Score:
    """Loss and exact match of `bundle` over `cases`; its answers in their order."""
    answers = greedy_answers(bundle, cases, batch_size=batch_size)
    n_right = sum(answer.strip() == case.reference.strip() for answer, case in zip(answers, cases, strict=True))
    return Score(mean_loss(bundle, [case.sample for case in cases]), n_right / len(cases), answers)


def mean_loss(bundle: ModelBundle, samples: Sequence[LabelledSample]) -> float:
    """The loss of answers by the model's objective, per unit (nats per supervised token) over all samples together."""
    objective = of_answers(bundle.objective)
    lengths = np.array([objective.length(sample) for sample in samples])
    total, n_units = 0.0, 0.0
    with torch.inference_mode():
        for indices in micro_batches(np.arange(len(samples)), lengths, micro_tokens=MICRO_TOKENS):
            loss, n = objective.loss_of(bundle.model, [samples[i] for i in indices], bundle.model.device)
            total, n_units = total + float(loss), n_units + n
    return total / n_units


def greedy_answers(bundle: ModelBundle, cases: Sequence[Case], *, batch_size: int) -> list[str]:
    """The likeliest answer to each case, in order; asked in batches of like length."""
    sampling = SamplingOptions()
    order = sorted(range(len(cases)), key=lambda i: (cases[i].row.max_new_tokens, len(cases[i].row.ids)))
    answers = [""] * len(cases)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, generation in zip(batch, answer_safely(bundle, [cases[i].row for i in batch], sampling), strict=True):
            answers[i] = generation.text
    return answers
