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

from onecard.config.run import TrainOptions
from onecard.data.batches import collate
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import LabelledSample
from onecard.data.pairs import PairEncoder
from onecard.model.answer_log_probs import answer_log_probs
from onecard.model.lora.peft_model import unwrap
from onecard.objectives.base import LossSums, Objective, SampleView
from onecard.objectives.shared_prompt import collate_pairs, pair_lengths


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to one prompt, each with it."""

    chosen: LabelledSample
    rejected: LabelledSample
    row: int = 0
    """Of the chosen answer in the data set; the rejected one's follows."""
    reference: np.ndarray | None = None
    """float32 (2,), the log-probabilities of both under the reference, where they were computed before."""
    n_shared: int | None = None
    """Both answers are in one row, in which so many tokens of the prompt stand once; None: each is a row."""

    @property
    def record(self) -> str:
        return self.chosen.record


class PairView(SampleView):
    """Every two rows, which lie side by side, are one sample; both are padded to the longer one, or share a prompt."""

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows[::2])
        self.pairs = rows.reshape(-1, 2)
        self.share(None)
        self.units = np.ones(len(self.pairs), dtype=np.int64)
        self.reference: np.ndarray | None = None
        """float32 (n_rows of the data set,), the log-probability of each answer under the reference, where cached."""

    def share(self, n_shared: np.ndarray | None) -> None:
        """Let pairs share so many tokens of their prompts, int32 (n_pairs of the data set,); None: answers are rows."""
        self.n_shared, self.shares_prompt = n_shared, n_shared is not None
        of_pairs = None if n_shared is None else n_shared[self.rows // 2]
        self.lengths = pair_lengths(self.dataset.lengths[self.pairs], of_pairs)

    def __getitem__(self, position: int) -> AnswerPair:
        return self.pair(int(self.rows[position]))

    def pair(self, row: int) -> AnswerPair:
        """The pair whose chosen answer is this row of the data set."""
        reference = None if self.reference is None else self.reference[[row, row + 1]]
        shared = None if self.n_shared is None else int(self.n_shared[row // 2])
        return AnswerPair(self.dataset[row], self.dataset[row + 1], row, reference, shared)


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

    def length(self, sample: AnswerPair) -> int:
        return pair_length(sample)

    def collate(self, samples: Sequence[AnswerPair]) -> dict[str, Tensor]:
        batch = collated(samples)
        known = [pair.reference for pair in samples if pair.reference is not None]
        return {**batch, "reference": torch.from_numpy(np.stack(known))} if len(known) == len(samples) else batch

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
        # A reward is beta times the score, by which TRL, too, says which answer is the better one.
        metrics = pair_metrics(self.beta * scores.detach(), *policy.detach().unbind(1))
        return LossSums(losses.sum(), len(losses), metrics)

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


def pair_metrics(rewards: Tensor, *more: Tensor) -> Tensor:
    """The sums (n_metrics, 2) of the rewards (n, 2) of pairs, how often and by how much the chosen one's is larger."""
    margins = rewards[:, 0] - rewards[:, 1]
    each = torch.stack([*rewards.unbind(1), (margins > 0).float(), margins, *more])
    return torch.stack([each.sum(dim=1), torch.full_like(each[:, 0], len(rewards))], dim=1)


def pair_length(pair: AnswerPair) -> int:
    """`pair_lengths` of one."""
    lengths = np.array([[len(pair.chosen.input_ids), len(pair.rejected.input_ids)]])
    return int(pair_lengths(lengths, None if pair.n_shared is None else np.array([pair.n_shared]))[0])


def collated(samples: Sequence[AnswerPair]) -> dict[str, Tensor]:
    """A batch of pairs: two rows for each, or one row where they share their prompts."""
    shared = [(each.chosen, each.rejected, each.n_shared) for each in samples if each.n_shared is not None]
    if shared:
        return collate_pairs(shared)
    return collate([row for pair in samples for row in (pair.chosen, pair.rejected)], pad_id=0)


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
