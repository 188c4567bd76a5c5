"""The objectives of a causal language model: the cross-entropy of the next token, over the tokens that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from onecard.data.batches import collate
from onecard.data.chat_template import Template
from onecard.data.encode import IGNORE_INDEX, Encoder, EncodeSettings, LabelledSample
from onecard.model.answer_log_probs import token_log_probs
from onecard.model.chunked_loss import summed_loss
from onecard.objectives.base import Objective


class SupervisedFineTuning(Objective):
    """Of conversations the answers are learned, of documents every token; a file may hold both. Its units: tokens."""

    name = "sft"

    def collate(self, samples: Sequence[LabelledSample]) -> dict[str, Tensor]:
        return collate(samples, pad_id=0)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, float]:
        return summed_loss(model, batch, chunk_tokens=chunk_tokens)

    def sample_sums(
        self, model: nn.Module, samples: Sequence[Any], device: Any, *, chunk_tokens: int = 0, row_tokens: int = 0
    ) -> Tensor:
        batch = {name: tensor.to(device) for name, tensor in self.collate(samples).items()}
        log_probs, units = token_log_probs(model, batch, chunk_tokens=chunk_tokens)
        if "loss_weights" in batch:
            learned = batch["labels"][:, 1:] != IGNORE_INDEX
            weights = pad(batch["loss_weights"][:, 1:] * learned, (0, 1)).to(log_probs)
            log_probs, units = log_probs * weights, weights.sum(dim=1)
        return torch.stack([-log_probs.double().sum(dim=1), units.double()], dim=1).cpu()


class EveryTokenEncoder(Encoder):
    """Learns prompts as well as answers."""

    def __init__(self, template: Template, tokenizer: Any, settings: EncodeSettings) -> None:
        super().__init__(template, tokenizer, replace(settings, train_on="everything"))


class PlainDocuments(SupervisedFineTuning):
    """Each record is text of which every token is learned, conversations in their template included."""

    name = "documents"
    encoder = EveryTokenEncoder
