"""Two answers in one row behind one prompt: the mask that keeps them apart.

It is given whole, (batch, 1, seq, seq), and transformers hands it on to the attention as it is; the kernels that take
rows of several texts take it, too. Knows which part of a row each token is of; does not know pairs or losses
(objectives/shared_prompt.py), nor which models hold to a mask (packed_rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onecard.model.output_head import innermost

PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # the segments of a row


def forward_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the forward pass of a batch is called with; a mask only for rows of `segments` (batch, seq)."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": None, "use_cache": False}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    if "segments" in batch:
        inputs["attention_mask"] = pair_mask(model, batch["segments"])
    return inputs


def pair_mask(model: nn.Module, segments: Tensor) -> Tensor:
    """What each token of rows (batch, seq) sees: what is before it in the prompt and in its own answer.

    (batch, 1, seq, seq), bool; for eager attention, which adds it, in the number format of the model.
    """
    n = segments.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, None, :], segments[:, None, :, None]
    seen = causal & ((keys == PROMPT) | (keys == queries))
    inner = innermost(model)
    if inner.config._attn_implementation != "eager":
        return seen
    lowest = torch.finfo(inner.dtype).min
    return torch.zeros(seen.shape, dtype=inner.dtype, device=seen.device).masked_fill(~seen, lowest)
