"""The loss: a sum over the supervised tokens of a micro-batch, so that a step does not depend on how it is cut.

Knows logits and labels. It does not know steps, scaling by a step's token count or the optimizer: `train/loop.py` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from onecard.console import ModelError
from onecard.text.encode import IGNORE_INDEX


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the cross-entropy summed over supervised tokens (a scalar, fp32) and the number of those tokens.

    batch: `input_ids`, `attention_mask` and `labels`, each (batch, seq), padded on the right. A label of -100 is not
    learned; labels are shifted here, so position t predicts token t + 1. `model` may be wrapped (DDP, accelerate):
    its own forward is called, so that gradient hooks fire, with an empty micro-batch too (loss 0, gradients 0).

        labels        -100 -100   7    9  -100     rows share one list of positions: here 1 and 2,
                      -100 -100 -100   4  -100     the union of [1, 2] and [2]
        logits of        .    x    x    .    .     (2, 2, vocab) instead of (2, 5, vocab)
        loss           -log p(7|..) - log p(9|..) - log p(4|..), 3 tokens

    Soft-capping and scaling of logits (Gemma 2, Cohere, Granite) are the model's own: its head is never called here.
    """
    labels = batch["labels"]
    targets = labels[:, 1:]
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        positions = torch.zeros(1, dtype=torch.long, device=labels.device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    logits = _logits_at(model, inputs, positions)
    # One token alone predicts nothing; its row is a dummy that must still reach the backward pass.
    wanted = targets[:, positions] if targets.shape[1] else labels.new_full((len(labels), 1), IGNORE_INDEX)
    supervised = wanted != IGNORE_INDEX
    n_supervised = int(supervised.sum())
    if n_supervised == 0:
        return logits.float().sum() * 0.0, 0
    return cross_entropy(logits[supervised].float(), wanted[supervised], reduction="sum"), n_supervised


def _logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Return the logits (batch, len(positions), vocab) at `positions`, computing no others where the model can."""
    n_positions, n_seq = len(positions), inputs["input_ids"].shape[1]
    if not takes_positions(model):
        return model(**inputs).logits[:, positions]
    logits = model(**inputs, logits_to_keep=positions).logits
    if logits.shape[1] != n_positions:
        raise ModelError(
            f"{type(model).__name__} gave logits for {logits.shape[1]} positions of {n_seq}, but "
            f"{n_positions} were asked for: its logits_to_keep does not take a list of positions"
        )
    return logits


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of the model inside all wrappers takes `logits_to_keep`."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
