"""The objectives of preference pairs: the chosen answer to a prompt is to be likelier than the rejected one.

dpo and ipo compare with a reference: the same base with its adapter off, asked in the same micro-batch, or what
train/reference.py computed before training. The unit is the pair. Knows log-probabilities of answers; does not know how
they are computed (model/answer_log_probs.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from onecard.config.training import TrainOptions
from onecard.data.batches import collate
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import LabelledSample
from onecard.data.pairs import PairEncoder
from onecard.model.answer_log_probs import answer_log_probs
from onecard.model.lora.adapter import unwrap
from onecard.objectives.base import LossSums, Objective, SampleView
from onecard.objectives.next_token import SupervisedFineTuning


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to one prompt, each with it."""

    chosen: LabelledSample
    rejected: LabelledSample
    row: int = 0
    """Of the chosen answer in the data set; the rejected one's follows."""
    reference: np.ndarray | None = None
    """float32 (2,), the log-probabilities of both under the reference, where they were computed before."""

    @property
    def record(self) -> str:
        return self.chosen.record


class PairView(SampleView):
    """Every two rows, which lie side by side, are one sample; both are padded to the longer one."""

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows[::2])
        self.pairs = rows.reshape(-1, 2)
        self.lengths = 2 * dataset.lengths[self.pairs].max(axis=1)
        self.units = np.ones(len(self.pairs), dtype=np.int64)
        self.reference: np.ndarray | None = None
        """float32 (n_rows of the data set,), the log-probability of each answer under the reference, where cached."""

    def __getitem__(self, position: int) -> AnswerPair:
        row, other = map(int, self.pairs[position])
        reference = None if self.reference is None else self.reference[[row, other]]
        return AnswerPair(self.dataset[row], self.dataset[other], row, reference)


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """beta: how much the difference of two answers counts. sft_weight: of the chosen answer's own loss beside it."""

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    encoder = PairEncoder
    samples = PairView
    unit: ClassVar[str] = "pair"
    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    )  # fmt: skip
    uses_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    """Whether the score of an answer is divided by its tokens."""

    def with_options(self, options: TrainOptions) -> Objective:
        beta = options.pref_beta or self.beta
        return replace(self, beta=beta, label_smoothing=options.label_smoothing, sft_weight=options.sft_weight)

    @property
    def of_answers(self) -> Objective:
        return SupervisedFineTuning()

    def length(self, sample: AnswerPair) -> int:
        return pair_length(sample)

    def collate(self, samples: Sequence[AnswerPair]) -> dict[str, Tensor]:
        batch = collate([row for pair in samples for row in (pair.chosen, pair.rejected)], pad_id=0)
        known = [pair.reference for pair in samples if pair.reference is not None]
        return {**batch, "reference": torch.from_numpy(np.stack(known))} if len(known) == len(samples) else batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, float]:
        return self.sums(model, batch, chunk_tokens=chunk_tokens)[:2]

    def sums(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> LossSums:
        reference = batch.get("reference") if self.uses_reference else None
        if self.uses_reference and reference is None:
            with adapter_off(model):  # first, so that no gradients wait meanwhile
                reference = pair_log_probs(model, batch, chunk_tokens=chunk_tokens)[0]
        policy, sizes = pair_log_probs(model, batch, chunk_tokens=chunk_tokens)
        scores = policy if reference is None else policy - reference.to(policy.device)
        if self.per_token:
            scores = scores / sizes
        losses = self.of_pairs(scores)
        if self.sft_weight:
            losses = losses - self.sft_weight * policy[:, 0] / sizes[:, 0]
        return LossSums(losses.sum(), len(losses), self._metric_sums(scores.detach(), policy.detach()))

    def _metric_sums(self, scores: Tensor, policy: Tensor) -> Tensor:
        """(n_metrics, 2); a reward is beta times the score, by which TRL, too, says which answer is the better one."""
        rewards = self.beta * scores
        margins = rewards[:, 0] - rewards[:, 1]
        each = torch.stack([*rewards.unbind(1), (margins > 0).float(), margins, *policy.unbind(1)])
        return torch.stack([each.sum(dim=1), torch.full_like(each[:, 0], len(scores))], dim=1)

    @abstractmethod
    def of_pairs(self, scores: Tensor) -> Tensor:
        """The loss of each pair (n,) by the scores (n, 2) of chosen and rejected answers.

        A score is the log-probability of the answer; where there is a reference, that under it is subtracted. With
        `per_token` it is divided by the tokens of the answer.
        """

    def _smoothed(self, logits: Tensor) -> Tensor:
        """-log sigmoid; with a share of label_smoothing the pair is taken as the other way round."""
        wrong = self.label_smoothing
        return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)


@dataclass(frozen=True)
class DirectPreference(PreferenceObjective):
    """DPO, arXiv:2305.18290; with label_smoothing its conservative form. RPO with sft_weight, arXiv:2404.19733."""

    name = "dpo"
    beta: float = 0.1
    uses_reference = True

    def of_pairs(self, scores: Tensor) -> Tensor:
        return self._smoothed(self.beta * (scores[:, 0] - scores[:, 1]))


@dataclass(frozen=True)
class IdentityPreference(PreferenceObjective):
    """IPO, arXiv:2310.12036, eq. 17; scores per token, as its authors meant and TRL has it."""

    name = "ipo"
    beta: float = 0.1
    uses_reference = True
    per_token = True

    def of_pairs(self, scores: Tensor) -> Tensor:
        return (scores[:, 0] - scores[:, 1] - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SimplePreference(PreferenceObjective):
    """SimPO, arXiv:2405.14734: log-probabilities per token, without a reference; gamma: the margin to be reached."""

    name = "simpo"
    beta: float = 2.0
    gamma: float = 1.0
    per_token = True

    def with_options(self, options: TrainOptions) -> Objective:
        found = super().with_options(options)
        return found if options.simpo_gamma == "auto" else replace(found, gamma=options.simpo_gamma)  # type: ignore[type-var]

    def of_pairs(self, scores: Tensor) -> Tensor:
        return self._smoothed(self.beta * (scores[:, 0] - scores[:, 1]) - self.gamma)


@dataclass(frozen=True)
class OddsRatioPreference(PreferenceObjective):
    """ORPO, arXiv:2403.07691: the chosen answer's own loss and beta times the odds ratio; per token, no reference."""

    name = "orpo"
    beta: float = 0.1
    per_token = True

    def of_pairs(self, scores: Tensor) -> Tensor:
        log_odds = scores - _log1mexp(scores)
        return -scores[:, 0] - self.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def pair_length(pair: AnswerPair) -> int:
    """Tokens that a pair adds to a micro-batch, where the shorter answer is padded."""
    return 2 * max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))


def pair_log_probs(model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """The log-probabilities (n, 2) of the chosen and the rejected answers of a batch of pairs, and their tokens."""
    summed, n_tokens = answer_log_probs(model, batch, chunk_tokens=chunk_tokens)
    return summed.view(-1, 2), n_tokens.view(-1, 2)


def _log1mexp(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it; x = 0 counts as the nearest number below."""
    logs = logs.clamp(max=-torch.finfo(logs.dtype).eps)
    # Both branches get a gradient, so the one not taken must not make NaN of it.
    near = logs > -0.6931472
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, logs, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1, logs))),
    )


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone, without dropout, noise and gradients; afterwards the model is as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), unwrap(model).disable_adapter():
            yield
    finally:
        model.train(was_training)
