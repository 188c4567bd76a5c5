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
from onecard.model.chunked_loss import SCALE, SupervisedTokens, loss_and_gradients, losses_in_place, scale_in_place
from onecard.model.output_head import OutputHead, logits_at, states_and_head
from onecard.model.shared_prompt import CHOSEN, REJECTED, forward_inputs


def answer_log_probs(model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the learned tokens summed by row, fp32 (batch,), and their numbers (batch,).

    Of rows that hold both answers of a pair (`segments`, objectives/shared_prompt.py) by answer, (2 batch,).

        labels  -100 -100  7  9      -> [log p(7|..) + log p(9|..), log p(4|..)], [2, 1]
                -100 -100  4 -100

    The rest as for `token_log_probs`.
    """
    each, n_tokens = token_log_probs(model, batch, chunk_tokens=chunk_tokens)
    if "segments" not in batch:
        return each.sum(dim=1), n_tokens
    learned = pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1)).to(each.device)
    sides = [(batch["segments"] == side).to(each.device) for side in (CHOSEN, REJECTED)]
    sums, counts = (torch.stack([(of * side).sum(dim=1) for side in sides], dim=1) for of in (each, learned))
    return sums.flatten(), counts.flatten()


def token_log_probs(
    model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each learned token, fp32 (batch, seq), and their numbers by row (batch,).

    They stand at the place before the token, where it is predicted; elsewhere is 0. The logits are divided by the
    temperature. batch, chunk_tokens and what is raised: as for `chunked_loss.summed_loss`; weights of tokens are not
    looked at.
    """
    inputs = forward_inputs(model, batch)
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    n_tokens = (targets != IGNORE_INDEX).sum(dim=1)
    found = states_and_head(model, inputs) if chunk_tokens > 0 else None
    if found is None:
        return _all_at_once(model, inputs, targets, temperature), n_tokens
    hidden, head = found[0], replace(found[1], temperature=temperature)
    flat, states = targets.flatten().to(hidden.device), hidden.flatten(0, 1)
    rows = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    tokens = SupervisedTokens(rows, flat[rows], None, chunk_tokens)
    trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or trained):
        each: Any = _TokenLogProbs.apply(head, tokens, states, *trained)
    else:
        each = _log_probs(head, tokens, states)
    return each.view(targets.shape), n_tokens.to(hidden.device)


def _all_at_once(model: nn.Module, inputs: dict[str, Any], targets: Tensor, temperature: float) -> Tensor:
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        positions = torch.zeros(1, dtype=torch.long, device=targets.device)
    logits = logits_at(model, inputs, positions)
    targets = targets.to(logits.device)
    wanted = targets[:, positions]
    learned = wanted != IGNORE_INDEX
    scores = logits[learned].float()
    losses = cross_entropy(scores if temperature == 1 else scores / temperature, wanted[learned], reduction="none")
    return -torch.zeros(targets.shape, device=losses.device).masked_scatter(targets != IGNORE_INDEX, losses)


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
