"""How good a quantised model still is: perplexity on held-out text, beside that of plain rounding.

Knows token ids and linear layers. Does not know where the text comes from (`calibration.py`) or how weights are packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from onecard.console import ModelError
from onecard.model.loss import IGNORE_INDEX, summed_loss

CHUNK_TOKENS = 512  # logits of a large vocabulary exist for so many tokens at a time


def perplexity(
    model: nn.Module, rows: Sequence[Sequence[int]], *, batch_size: int = 4, tell: Callable[[int], Any] | None = None
) -> float:
    """exp of the mean loss over every token but each row's first, which is predicted from nothing.

    rows: token ids, each row read alone. `tell` is called with the number of rows done. Raises ModelError where the
    model answers NaN or infinity. https://huggingface.co/docs/transformers/perplexity
    """
    device = next(model.parameters()).device
    by_length = sorted(rows, key=len)
    total, n_tokens = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = [torch.tensor(list(row)) for row in by_length[start : start + batch_size]]
        input_ids = pad_sequence(batch, batch_first=True)
        labels = pad_sequence(batch, batch_first=True, padding_value=IGNORE_INDEX)
        with torch.no_grad():
            inputs = {"input_ids": input_ids.to(device), "labels": labels.to(device)}
            loss, n = summed_loss(model, inputs, chunk_tokens=CHUNK_TOKENS)
        total, n_tokens = total + float(loss), n_tokens + n
        if tell is not None:
            tell(len(batch))
    if not math.isfinite(total) or n_tokens == 0:
        raise ModelError(f"the model answers held-out text with a loss of {total} over {n_tokens} tokens")
    return math.exp(min(total / n_tokens, 700.0))


def round_to_nearest(weight: Tensor, bits: int, group_size: int, *, symmetric: bool = True) -> Tensor:
    """The weight (out, in) after plain rounding to `bits`, each group of a row with a scale of its own; same dtype.

    The grid is that of GPTQ (https://arxiv.org/abs/2210.17323): 2^bits levels over the group's range, the scale kept
    in fp16. Symmetric: from -a to a for the largest |w| = a, 0 is level 2^(bits-1). group_size -1: the whole row.

        bits 2, symmetric, w = [-1.0, 0.1, 0.9, 1.0] -> scale 2/3, levels [0, 2, 3, 3] -> [-1.33, 0, 0.67, 0.67]
    """
    width = weight.shape[1]
    group_size = width if group_size == -1 else group_size
    return torch.cat([_rounded(group, bits, symmetric) for group in weight.float().split(group_size, dim=1)], dim=1).to(
        weight.dtype
    )


def _rounded(group: Tensor, bits: int, symmetric: bool) -> Tensor:
    top = 2**bits - 1
    low, high = group.amin(dim=1, keepdim=True).clamp(max=0), group.amax(dim=1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    scale = torch.where(empty, 1.0, (high - low) / top).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return (torch.clamp(torch.round(group / scale) + zero, 0, top) - zero) * scale


def round_layers(model: nn.Module, names: Iterable[str], bits: int, group_size: int, *, symmetric: bool = True) -> None:
    """Round the weights of these linear layers in place. Raises ModelError for a name that is no linear layer."""
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"{name} is a {type(layer).__name__}, no linear layer: its rounding cannot be measured")
        with torch.no_grad():
            layer.weight.copy_(round_to_nearest(layer.weight, bits, group_size, symmetric=symmetric))
