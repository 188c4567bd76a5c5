"""A reward model, arXiv:2203.02155: a scalar head on the adapter gives the chosen answer of a pair the larger number.

The unit is the pair. Knows rewards of rows; does not know how they come about (model/reward_head.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from onecard.config.run import TrainOptions
from onecard.data.batches import collate
from onecard.data.encode import LabelledSample
from onecard.data.pairs import RatedPairEncoder
from onecard.model.reward_head import rewards
from onecard.objectives.base import LossSums, Objective
from onecard.objectives.preference import AnswerPair, PairView, collated, pair_length, pair_metrics


@dataclass(frozen=True)
class RewardModelling(Objective):
    """-log sigmoid(r_chosen - r_rejected - margin), the loss of Bradley and Terry.

    center: what the square of r_chosen + r_rejected weighs beside it, which draws rewards to a mean of 0
    (arXiv:2312.09244).
    """

    center: float = 0.0

    name = "reward"
    encoder = RatedPairEncoder
    samples = PairView
    unit: ClassVar[str] = "pair"
    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    )  # fmt: skip

    def with_options(self, options: TrainOptions) -> Objective:
        return replace(self, center=options.center_rewards)

    def length(self, sample: AnswerPair) -> int:
        return pair_length(sample)

    def collate(self, samples: Sequence[AnswerPair]) -> dict[str, Tensor]:
        margins = [json.loads(pair.chosen.fields or "0") for pair in samples]
        rows = [row for pair in samples for row in (pair.chosen, pair.rejected)]
        batch = {**collated(samples), "last": last_tokens(rows)}
        if "segments" in batch:  # the second answer ends where the first one's row and its own part of it do
            shared = torch.tensor([pair.n_shared for pair in samples])
            batch["last"] = torch.stack([batch["last"][::2], batch["last"].view(-1, 2).sum(dim=1) + 1 - shared], dim=1)
        return {**batch, "margins": torch.tensor(margins, dtype=torch.float32)}

    def sums(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> LossSums:
        found = rewards(model, batch).view(-1, 2)
        apart = found[:, 0] - found[:, 1]
        losses = -logsigmoid(apart - batch["margins"].to(apart.device))
        if self.center:
            losses = losses + self.center * found.sum(dim=1).square()
        return LossSums(losses.sum(), len(losses), pair_metrics(found.detach()))


def collate_rows(rows: Sequence[LabelledSample]) -> dict[str, Tensor]:
    """Rows to what `reward_head.rewards` takes."""
    return {"input_ids": collate(rows, pad_id=0)["input_ids"], "last": last_tokens(rows)}


def last_tokens(rows: Sequence[LabelledSample]) -> Tensor:
    """The place of the last token of each row, (n,)."""
    return torch.tensor([len(row.input_ids) - 1 for row in rows])
