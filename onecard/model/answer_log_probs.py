"""The log-probability of each row's answer, differentiable, with logits for some of its tokens at a time.

For losses that compare whole answers (preferences), where `chunked_loss.py` knows a sum over tokens only. The gradient
of a row is known only after all rows have been read, so logits are computed once forward and once more backward. Memory
at the peak of a chunk is that of `chunked_loss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from onecard.data.encode import IGNORE_INDEX
from onecard.model.chunked_loss import (
    SCALE,
    OutputHead,
    SupervisedTokens,
    logits_at,
    loss_and_gradients,
    losses_in_place,
    scale_in_place,
    states_and_head,
)


def answer_log_probs(model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the learned tokens summed by row, fp32 (batch,), and their numbers (batch,).

    batch, chunk_tokens and what is raised: as for `chunked_loss.summed_loss`; weights of tokens are not looked at.

        labels  -100 -100  7  9      -> [log p(7|..) + log p(9|..), log p(4|..)], [2, 1]
                -100 -100  4 -100
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": None, "use_cache": False}
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    n_tokens = (targets != IGNORE_INDEX).sum(dim=1)
    found = states_and_head(model, inputs) if chunk_tokens > 0 else None
    if found is None:
        return _all_at_once(model, inputs, targets), n_tokens
    hidden, head = found
    flat, states = targets.flatten().to(hidden.device), hidden.flatten(0, 1)
    rows = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    tokens = SupervisedTokens(rows, flat[rows], None, chunk_tokens)
    trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or trained):
        each: Any = _TokenLogProbs.apply(head, tokens, states, *trained)
    else:
        each = _log_probs(head, tokens, states)
    return each.view(targets.shape).sum(dim=1), n_tokens.to(hidden.device)


def _all_at_once(model: nn.Module, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        positions = torch.zeros(1, dtype=torch.long, device=targets.device)
    logits = logits_at(model, inputs, positions)
    wanted = targets[:, positions].to(logits.device)
    learned = wanted != IGNORE_INDEX
    losses = cross_entropy(logits[learned].float(), wanted[learned], reduction="none")
    return -torch.zeros(wanted.shape, device=losses.device).masked_scatter(learned, losses).sum(dim=1)


def _log_probs(head: OutputHead, tokens: SupervisedTokens, states: Tensor) -> Tensor:
    """Of each token (batch * seq,), 0 where nothing is learned; no gradients."""
    each = torch.zeros(len(states), dtype=torch.float32, device=states.device)
    with torch.no_grad():
        for rows, wanted, _ in tokens.chunks():
            each[rows] = -losses_in_place(head.finish(head.output(states[rows])), wanted)
    return each


class _TokenLogProbs(torch.autograd.Function):
    """`_log_probs`; the backward pass is that of a loss in which each token weighs what its gradient is."""

    @staticmethod
    def forward(ctx: Any, head: OutputHead, tokens: SupervisedTokens, hidden: Tensor, *trained: Tensor) -> Tensor:
        """hidden: (batch * seq, hidden). trained: the head's parameters that need gradients."""
        ctx.head, ctx.tokens = head, tokens
        ctx.save_for_backward(hidden, *trained)
        return _log_probs(head, tokens, hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = ctx.saved_tensors
        weights = -grad_outputs[0][ctx.tokens.rows]
        # The loss scaler's factor and a small share of a step leave fp16's range; the largest weight becomes 1.
        largest = weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(weights) else weights.sum()
        tokens = replace(ctx.tokens, weights=weights / largest)
        _, gradients = loss_and_gradients(ctx.head, tokens, hidden, trained, of_hidden=ctx.needs_input_grad[2])
        scale_in_place(gradients, largest / SCALE)
        return (None, None, *gradients)
