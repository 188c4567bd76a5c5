"""The scalar head of a reward model: a number for a whole text, out of the last hidden state of its last token.

It is called as AutoModelForSequenceClassification calls its own, so that plain PEFT finds it again. Knows the model's
states; does not know adapters, pairs or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import ModelError
from onecard.model.output_head import innermost, states_and_head
from onecard.model.shared_prompt import forward_inputs

SCORE = "score"


def add_reward_head(model: Any) -> None:
    """Give a causal language model a linear layer hidden -> 1, fp32, drawn as transformers draws new heads.

    Raises ModelError for a model without an output head, whose states cannot be had.
    """
    head = model.get_output_embeddings()
    if head is None or hasattr(model, SCORE):
        raise ModelError(f"{type(model).__name__} has {'no output' if head is None else 'another'} head: it cannot be "
                         "made a reward model (finetune --objective reward)")  # fmt: skip
    config = model.config.get_text_config()
    score = nn.Linear(head.in_features, 1, bias=False, dtype=torch.float32)
    nn.init.normal_(score.weight, std=getattr(config, "initializer_range", None) or 0.02)
    model.add_module(SCORE, score.to(model.get_input_embeddings().weight.device))


def rewards(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The reward of each text, fp32, in the shape of `last`: (batch,) or (batch, n), the place where each text of a row
    ends; input_ids (batch, seq), padded on the right. Raises ModelError for a model whose states cannot be had."""
    found = states_and_head(model, forward_inputs(model, batch))
    if found is None:
        raise ModelError(f"what enters the head of {type(innermost(model)).__name__} is not known, so it cannot be "
                         "made a reward model (finetune --objective reward)")  # fmt: skip
    hidden = found[0]
    last = batch["last"].to(hidden.device)
    rows = torch.arange(len(hidden), device=hidden.device).view(-1, *[1] * (last.dim() - 1))
    score: nn.Module = getattr(innermost(model), SCORE)
    each: Tensor = score(hidden[rows, last].float())
    return each.squeeze(-1)
