"""KTO, arXiv:2402.01306: answers that are marked good become likelier, those marked bad less likely; the unit is one.

What both are measured by is the mean log-ratio of mismatched answers, a property of the whole step: it is estimated
without gradients before them, so that the loss does not depend on how the step is cut. Reference: the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from onecard.config.run import TrainOptions
from onecard.data.batches import collate
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.data.pairs import GoodOrBadEncoder
from onecard.model.answer_log_probs import answer_log_probs
from onecard.model.input_limits import position_limit
from onecard.objectives.base import LossSums, Objective, SampleView
from onecard.objectives.preference import adapter_off


class MarkedAnswerView(SampleView):
    """Each row is a sample, which counts once."""

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows)
        self.units = np.ones(len(rows), dtype=np.int64)


class LogRatio(Objective):
    """By how much the adapter makes answers likelier, in nats, summed over the answers of a batch."""

    name = "log_ratio"
    unit = "answer"

    def collate(self, samples: Sequence[LabelledSample]) -> dict[str, Tensor]:
        batch = collate(samples, pad_id=0)
        batch.pop("loss_weights", None)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, float]:
        limit = position_limit(model)  # a long prompt may have met a long answer
        cut = {name: tensor[:, :limit] for name, tensor in batch.items()}
        policy, reference = log_probs_and_reference(model, cut, chunk_tokens=chunk_tokens)
        return (policy - reference).sum(), len(policy)


@dataclass(frozen=True)
class KahnemanTversky(LogRatio):
    """beta: how strongly one answer pulls; kl: the mean log-ratio of the step's mismatched answers, 0 or more."""

    name = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float = 0.0

    encoder = GoodOrBadEncoder
    samples = MarkedAnswerView
    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl",
    )  # fmt: skip
    looks_ahead = True

    def with_options(self, options: TrainOptions) -> Objective:
        return replace(self, beta=options.pref_beta or self.beta, desirable_weight=options.desirable_weight,
                       undesirable_weight=options.undesirable_weight)  # fmt: skip

    def estimator(self, samples: Sequence[LabelledSample]) -> tuple[Objective, Sequence[LabelledSample]] | None:
        return (LogRatio(), mismatched(samples)) if len(samples) > 1 else None

    def with_estimate(self, estimate: float) -> Objective:
        return replace(self, kl=max(0.0, estimate))

    def collate(self, samples: Sequence[LabelledSample]) -> dict[str, Tensor]:
        # The encoder gives the tokens of bad answers the weight -1.
        return {
            **super().collate(samples),
            "good": torch.tensor([min(each.weights, default=1) > 0 for each in samples]),
        }

    def sums(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> LossSums:
        policy, reference = log_probs_and_reference(model, batch, chunk_tokens=chunk_tokens)
        ratios, good = policy - reference, batch["good"].to(policy.device)
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(sign * self.beta * (ratios - self.kl)))
        return LossSums(losses.sum(), len(losses), self._metric_sums(ratios.detach(), policy.detach(), good))

    def _metric_sums(self, ratios: Tensor, policy: Tensor, good: Tensor) -> Tensor:
        chosen, rejected = good.float(), (~good).float()
        rewards, n = self.beta * ratios, len(ratios)
        sums = [((each * side).sum(), side.sum()) for each in (rewards, policy) for side in (chosen, rejected)]
        return torch.stack([*map(torch.stack, sums), rewards.new_tensor([self.kl * n, n])])

    def means(self, metrics: Sequence[float]) -> dict[str, float]:
        found = super().means(metrics)
        if found.keys() >= {"rewards/chosen", "rewards/rejected"}:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def mismatched(samples: Sequence[LabelledSample]) -> list[LabelledSample]:
    """Each prompt with the answer of the sample before it, the first with the last one's, as TRL pairs a batch."""
    found = []
    for number, sample in enumerate(samples):
        prompt, answer = sample.input_ids[: _start(sample)], samples[number - 1]
        learned = answer.input_ids[_start(answer) :]
        labels = [IGNORE_INDEX] * len(prompt) + learned
        found.append(LabelledSample([*prompt, *learned], labels, sample.record, sample.group))
    return found


def log_probs_and_reference(model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the answers (n,), with the adapter and by the base alone."""
    with adapter_off(model):  # first, so that no gradients wait meanwhile
        reference = answer_log_probs(model, batch, chunk_tokens=chunk_tokens)[0]
    return answer_log_probs(model, batch, chunk_tokens=chunk_tokens)[0], reference


def _start(sample: LabelledSample) -> int:
    """Where the answer begins."""
    return next(place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX)
