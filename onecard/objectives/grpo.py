"""Group relative policy optimisation: several answers to a prompt are sampled, rewarded and compared with one another.

GRPO, arXiv:2402.03300, with the normalisations of DAPO, arXiv:2503.14476, and Dr. GRPO, arXiv:2503.20783. Knows
rewards as numbers and log-probabilities of tokens; does not know how answers are sampled (train/rollouts.py) or
rewarded (rewards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.batches import collate
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.data.prompts import PromptEncoder
from onecard.model.answer_log_probs import token_log_probs
from onecard.objectives.base import LossSums, Objective, SampleView
from onecard.objectives.preference import adapter_off

LEAST_DEVIATION = 1e-4  # added to the deviation of a group's rewards, as TRL has it


@dataclass(slots=True)
class Rollout(LabelledSample):
    """A prompt with one sampled answer, of which every token is learned.

    n_prompt: tokens of the prompt. text: the answer. ended: False where --rollout_max_tokens cut it off. rewards: by
    the name of what gave them, unweighted. old (n_answer,): log-probabilities of the answer's tokens before the first
    of several updates; empty where there is one.
    """

    n_prompt: int = 0
    text: str = ""
    ended: bool = True
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    group_std: float = 0.0
    advantage: float = 1.0
    old: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return self.input_ids[: self.n_prompt]


def rollout_of(row: LabelledSample, answer: Sequence[int], **known: Any) -> Rollout:
    """The prompt of a row with the ids of an answer behind it."""
    prompt = row.prompt if isinstance(row, Rollout) else row.input_ids
    labels = [IGNORE_INDEX] * len(prompt) + list(answer)
    return Rollout([*prompt, *answer], labels, row.record, row.group, fields=row.fields, n_prompt=len(prompt), **known)


class PromptView(SampleView):
    """Prompts; each is shown with an answer of the greatest length, as memory is planned for and tried with it."""

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray, max_tokens: int) -> None:
        super().__init__(dataset, rows)
        self.lengths = self.lengths + max_tokens
        self.units = np.ones(len(rows), dtype=np.int64)
        self._max_tokens = max_tokens

    def __getitem__(self, position: int) -> Rollout:
        row = self.dataset[int(self.rows[position])]
        return rollout_of(row, row.input_ids[-1:] * self._max_tokens)


class RolloutView(Sequence[Rollout]):
    """The rollouts of a step as samples; arrays as those of `SampleView`."""

    def __init__(self, rollouts: Sequence[Rollout], units: Sequence[int], parts: np.ndarray | None) -> None:
        self._rollouts, self.parts, self.units = rollouts, parts, np.array(units)
        self.lengths = np.array([len(rollout.input_ids) for rollout in rollouts])

    def __len__(self) -> int:
        return len(self._rollouts)

    def __getitem__(self, position: Any) -> Any:
        return self._rollouts[position]


def group_advantages(rewards: Tensor, *, divide: bool = True) -> Tensor:
    """How much better each answer of a group (n_groups, n) is than their mean, in deviations (of n - 1) if `divide`."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + LEAST_DEVIATION) if divide else centred


@dataclass(frozen=True)
class GroupRelative(Objective):
    """Its samples are rollouts; what it is divided by, see --grpo_loss."""

    loss_type: str = "dapo"
    clip: float = 0.2
    clip_high: float = 0.2
    kl_beta: float = 0.0
    temperature: float = 1.0
    max_tokens: int = 256
    mask_overlong: bool = False

    name = "grpo"
    unit: ClassVar[str] = "sampled token"
    metrics = ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "clip_ratio", "kl")
    encoder = PromptEncoder

    def with_options(self, options: TrainOptions) -> Objective:
        return GroupRelative(
            options.grpo_loss, options.grpo_clip, options.grpo_clip_high or options.grpo_clip, options.kl_beta,
            options.rollout_temperature, options.rollout_max_tokens, options.mask_overlong,
        )  # fmt: skip

    def view(self, dataset: EncodedDataset, rows: np.ndarray, config: FinetuneConfig) -> SampleView:
        return PromptView(dataset, rows, self.max_tokens)

    def rollout_view(self, groups: Sequence[Sequence[Rollout]], parts: np.ndarray | None) -> RolloutView:
        """The rollouts of some prompts, with their advantages; parts (n_groups,): the source of each prompt."""
        rewards = torch.tensor([[each.reward for each in group] for group in groups], dtype=torch.float64)
        advantages = group_advantages(rewards, divide=self.loss_type != "dr_grpo")
        for group, of_group, deviation in zip(groups, advantages.tolist(), rewards.std(dim=1).tolist(), strict=True):
            for each, advantage in zip(group, of_group, strict=True):
                each.advantage, each.group_std = advantage, deviation
        every = [each for group in groups for each in group]
        of_each = None if parts is None else np.repeat(parts, [len(group) for group in groups])
        return RolloutView(every, [self._units(each) for each in every], of_each)

    def _units(self, rollout: Rollout) -> int:
        if self.loss_type == "dapo":
            return 0 if self._is_masked(rollout) else len(rollout.input_ids) - rollout.n_prompt
        return self.max_tokens if self.loss_type == "dr_grpo" else 1

    def _is_masked(self, rollout: Rollout) -> bool:
        return self.mask_overlong and not rollout.ended

    def evaluation_sums(self, rollouts: Sequence[Rollout]) -> Tensor:
        """What `sums` gives of answers that are only judged, flat: the reward, negated, stands for the loss."""
        values = torch.tensor([_metrics_of(each) for each in rollouts], dtype=torch.float64)
        counts = torch.full((4,), float(len(values)), dtype=torch.float64)
        counts[1] = 0  # one answer has no deviation
        metrics = torch.stack([values.sum(dim=0), counts], dim=1).flatten()
        return torch.cat([-values.sum(dim=0)[:1], counts[:1], metrics, torch.zeros(4, dtype=torch.float64)])

    def collate(self, samples: Sequence[Rollout]) -> dict[str, Tensor]:
        """Besides what `collate` gives: advantages and weights (batch,), and old (batch, seq) where it is known."""
        batch = collate(samples, pad_id=0)
        by_answer = self.loss_type == "grpo"
        weights = [
            0.0 if self._is_masked(each) else 1 / (len(each.input_ids) - each.n_prompt) if by_answer else 1.0
            for each in samples
        ]
        batch["advantages"] = torch.tensor([each.advantage for each in samples])
        batch["weights"] = torch.tensor(weights)
        batch["metrics"] = torch.tensor([_metrics_of(each) for each in samples])
        batch["units"] = torch.tensor([self._units(each) for each in samples])
        if any(each.old for each in samples):
            batch["old"] = torch.zeros(batch["labels"].shape)
            for row, each in enumerate(samples):
                # The token at place t is predicted at t - 1.
                batch["old"][row, each.n_prompt - 1 : len(each.input_ids) - 1] = torch.tensor(each.old)
        return batch

    def sums(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> LossSums:
        reference = self.log_probs(model, batch, chunk_tokens, of_base=True) if self.kl_beta else None
        policy = self.log_probs(model, batch, chunk_tokens)
        answered = (batch["labels"][:, 1:] != IGNORE_INDEX).to(policy.device)
        policy = policy[:, :-1]
        old = batch["old"][:, :-1].to(policy.device) if "old" in batch else policy.detach()
        ratio = torch.exp(policy - old)
        pull = batch["advantages"].to(policy.device)[:, None]
        losses = -torch.minimum(ratio * pull, ratio.clamp(1 - self.clip, 1 + self.clip_high) * pull)
        clipped = (ratio < 1 - self.clip) & (pull < 0) | (ratio > 1 + self.clip_high) & (pull > 0)
        metrics = [batch["metrics"].sum(dim=0), (clipped & answered).sum()[None], torch.zeros(1)]
        if reference is not None:
            apart = divergence(policy, reference[:, :-1])
            losses, metrics[2] = losses + self.kl_beta * apart, (apart.detach() * answered).sum()[None]
        of_rows = (losses * answered).sum(dim=1) * batch["weights"].to(policy.device)
        sums = torch.cat([each.to(policy.device) for each in metrics])
        n_rows, n_tokens = torch.full((len(sums) - 2,), len(policy)), int(answered.sum())
        known = ("old" in batch, reference is not None)
        counts = torch.cat([n_rows, torch.tensor([n_tokens * is_known for is_known in known])]).to(sums)
        return LossSums(of_rows.sum(), float(batch["units"].sum()), torch.stack([sums, counts], dim=1))

    def log_probs(
        self, model: nn.Module, batch: dict[str, Tensor], chunk_tokens: int, *, of_base: bool = False
    ) -> Tensor:
        """The log-probability (batch, seq) of the token behind each place of answers, fp32, 0 elsewhere.

        of_base: that of the model without its adapter, without gradients.
        """
        with adapter_off(model) if of_base else nullcontext():
            return token_log_probs(model, batch, chunk_tokens=chunk_tokens, temperature=self.temperature)[0]


def _metrics_of(rollout: Rollout) -> tuple[float, float, float, float]:
    """What the first metrics are the means of."""
    n_tokens = len(rollout.input_ids) - rollout.n_prompt
    return rollout.reward, rollout.group_std, float(n_tokens), float(not rollout.ended)


def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """The estimate k3 of KL(policy, reference) by the log-probabilities of sampled tokens: never below 0.

    http://joschu.net/blog/kl-approx.html
    """
    difference = reference - policy
    return torch.exp(difference) - difference - 1
