"""How good a quantised model still is: perplexity on held-out text, and how far its predictions went from the old ones.

Knows token ids and linear layers. Does not know where the text comes from (`calibration.py`) or how weights are packed.

Perplexity tells what a user will notice. It cannot tell which of two ways to quantise is better where both cost little:
noise in the weights moves some predictions towards the text and others away from it, so that a model can even come out
"better" than before. The Kullback-Leibler divergence from the unquantised model's predictions is 0 where nothing
changed and larger for any change, whichever way. https://arxiv.org/abs/2407.09141
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss

from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.errors import ModelError
from onecard.model.output_head import states_before_head
from onecard.objectives.base import Objective

CHUNK_TOKENS = 128  # logits of a large vocabulary exist for so many tokens at a time, in a few copies


@dataclass(frozen=True)
class QuantizedQuality:
    """Perplexity, and nats per token between these predictions and the unquantised model's.

    `divergence` is None for a model whose predictions cannot be compared (see `states_before_head`). `states`, of the
    unquantised model alone: what enters its head (tokens, hidden), batch by batch, in RAM.
    """

    perplexity: float
    divergence: float | None = 0.0
    states: tuple[Tensor, ...] = ()


def quality_of(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    before: QuantizedQuality | None = None,
    *,
    objective: Objective,
    batch_size: int = 4,
    tell: Callable[[int], Any] | None = None,
) -> QuantizedQuality:
    """Measure a model on token ids, each row read alone; every token but a row's first is predicted.

    before: what this gave for the unquantised model, on the same rows and with the same batch size; its head must be
    this model's, which no way to quantise here touches. Perplexity is exp of the mean loss, the divergence the mean of
    sum(p * log(p / q)) over the vocabulary, p the unquantised model's probabilities of the next token and q this
    one's. `tell` is called with the number of rows done. Raises ModelError where the model answers NaN or infinity.
    https://huggingface.co/docs/transformers/perplexity
    """
    device = next(model.parameters()).device
    by_length = sorted(rows, key=len)
    kept: list[Tensor] = []
    loss, divergence, n_tokens, comparable = 0.0, 0.0, 0, before is None or before.divergence is not None
    for number, start in enumerate(range(0, len(by_length), batch_size)):
        batch = [LabelledSample(list(row), list(row), "", 0) for row in by_length[start : start + batch_size]]
        inputs = {name: tensor.to(device) for name, tensor in objective.collate(batch).items()}
        found = states_before_head(model, inputs)
        n_tokens += sum(len(row.input_ids) - 1 for row in batch)
        if found is None or not comparable:
            comparable = False
            with torch.no_grad():
                loss += float(objective.loss(model, inputs, chunk_tokens=CHUNK_TOKENS)[0])
        else:
            states, logits_of = found
            labels = inputs["labels"]
            is_asked = labels[:, 1:] != IGNORE_INDEX
            states, wanted = states[:, :-1][is_asked], labels[:, 1:][is_asked]
            old = before.states[number] if before is not None else None
            added = _loss_and_divergence(states, wanted, old, logits_of)
            loss, divergence = loss + added[0], divergence + added[1]
            if before is None:
                kept.append(states.cpu())
        if tell is not None:
            tell(len(batch))
    if not math.isfinite(loss + divergence) or n_tokens == 0:
        raise ModelError(f"the model answers held-out text with a loss of {loss} over {n_tokens} tokens")
    perplexity = math.exp(min(loss / n_tokens, 700.0))
    return (
        QuantizedQuality(perplexity, divergence / n_tokens, tuple(kept))
        if comparable
        else QuantizedQuality(perplexity, None)
    )


def _loss_and_divergence(
    states: Tensor, wanted: Tensor, old: Tensor | None, logits_of: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """The summed loss and divergence of states (tokens, hidden); `old` are the unquantised model's, or None."""
    loss, divergence = 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(states), CHUNK_TOKENS):
            some = slice(start, start + CHUNK_TOKENS)
            new_log = logits_of(states[some]).log_softmax(dim=-1)
            loss += float(nll_loss(new_log, wanted[some], reduction="sum"))
            if old is not None:
                old_log = logits_of(old[some].to(states)).log_softmax(dim=-1)
                divergence += float(kl_div(new_log, old_log, reduction="sum", log_target=True))
    return loss, divergence


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
