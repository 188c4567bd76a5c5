"""The loss: a sum over the supervised tokens of a micro-batch, so that a step does not depend on how it is cut.

Knows logits and labels; `output_head.py` knows the way from the last hidden states to the logits. It does not know
steps, scaling by a step's token count or the optimizer: `train/loop.py` does.

With `chunk_tokens`, logits exist for that many tokens at a time. Let V be the vocabulary and H the hidden size; beside
the model's own last hidden states, what lives at the peak of a chunk is

    chunk_tokens * V * CHUNK_BYTES_PER_LOGIT[16 or 32]     the chunk's logits
    with a soft cap: chunk_tokens * V * CAPPED_BYTES_PER_LOGIT[16 or 32] + CAPPED_ROWS * V * 8
    batch * seq * H * (2 or 4)                             the gradient of the hidden states, kept for the backward pass
    trained head only: weights * 4, twice                  its gradients, and those of one chunk
    quantised head only: TILE_BYTES                        some of its rows, dequantised (memory_saving/tiled_head.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, pad
from torch.overrides import handle_torch_function, has_torch_function_unary

from onecard.data.encode import IGNORE_INDEX
from onecard.model.output_head import OutputHead, logits_at, states_and_head

# Bytes at the peak for each logit of a chunk, by the bits of the logits: 16-bit ones and their fp32 copy, which becomes
# the softmax and then the gradient in place; fp32 logits are their own copy. The same forward, backward and in
# evaluation; counted in tests/model/test_chunked_loss.py.
CHUNK_BYTES_PER_LOGIT = {16: 6, 32: 4}
# With a soft cap (Gemma), since the gradient of tanh needs its result.
CAPPED_BYTES_PER_LOGIT = {16: 6, 32: 8}

# Gradients of fp16 hidden states are computed before the loss scaler's factor is known, so they bring their own: the
# softmax of a large vocabulary is full of probabilities below 6e-8, fp16's smallest number. A power of two changes no
# digit of what does not underflow. With 1024, a head whose weights reach 32 would overflow; they lie below 2.
SCALE = 1024.0
ROWS_AT_ONCE = 1024  # of hidden states, while their gradients are scaled in fp32


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, float]:
    """Return the cross-entropy summed over supervised tokens (a scalar, fp32) and the number of those tokens.

    With `loss_weights` (batch, seq) in the batch each token's cross-entropy is multiplied by its weight, and the number
    is the sum of these weights. `position_ids` (batch, seq), where rows hold several texts, say where each begins.

    batch: `input_ids` and `labels`, each (batch, seq), padded on the right. A label of -100 is not learned; labels are
    shifted here, so position t predicts token t + 1. `model` may be wrapped (DDP, accelerate): its own forward is
    called, so that gradient hooks fire, with an empty micro-batch too (loss 0, gradients 0).

        labels        -100 -100   7    9  -100     rows share one list of positions: here 1 and 2,
                      -100 -100 -100   4  -100     the union of [1, 2] and [2]
        logits of        .    x    x    .    .     (2, 2, vocab) instead of (2, 5, vocab)
        loss           -log p(7|..) - log p(9|..) - log p(4|..), 3 tokens

    chunk_tokens: logits exist for at most so many supervised tokens at a time, forward and backward in one pass;
    0: for all positions at once. The result is the same. Soft-capping and scaling of logits (Gemma 2, Cohere, Granite)
    are applied as the model does; a model whose logits cannot be reproduced here is warned of once and not chunked.

    `attention_mask` is not passed on: a causal model's real token never looks at a pad to its right, so the mask
    changes nothing, but costs a (batch, 1, seq, seq) tensor and the fast causal kernel.
    Raises ModelError for a model whose `logits_to_keep` takes no list of positions.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": None, "use_cache": False}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    # The last position predicts nothing that is known; a token alone therefore has nothing to learn.
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    weights = batch.get("loss_weights")
    weights = None if weights is None else pad(weights[:, 1:], (0, 1))
    if chunk_tokens > 0:
        result = _chunked_loss(model, inputs, targets, weights, chunk_tokens)
        if result is not None:
            return result
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        positions = torch.zeros(1, dtype=torch.long, device=targets.device)
    logits = logits_at(model, inputs, positions)
    wanted = targets[:, positions]
    supervised = wanted != IGNORE_INDEX
    n_supervised = int(supervised.sum())
    if n_supervised == 0:
        return logits.float().sum() * 0.0, 0
    if weights is None:
        return cross_entropy(logits[supervised].float(), wanted[supervised], reduction="sum"), n_supervised
    losses = cross_entropy(logits[supervised].float(), wanted[supervised], reduction="none")
    of_tokens = weights[:, positions][supervised]
    return (losses * of_tokens).sum(), _total(of_tokens)


def _total(weights: Tensor) -> float:
    return float(weights.sum(dtype=torch.float64))


def _chunked_loss(
    model: nn.Module, inputs: dict[str, Any], targets: Tensor, weights: Tensor | None, chunk_tokens: int
) -> tuple[Tensor, float] | None:
    """The loss of `targets` (batch, seq), chunk by chunk; None for a model whose logits cannot be computed here."""
    found = states_and_head(model, inputs)
    if found is None:
        return None
    hidden, head = found
    flat = targets.flatten().to(hidden.device)
    rows = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    of_tokens = None if weights is None else weights.flatten().to(hidden.device)[rows]
    n_units = len(rows) if of_tokens is None else _total(of_tokens)
    tokens, states = SupervisedTokens(rows, flat[rows], of_tokens, chunk_tokens), hidden.flatten(0, 1)
    trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or trained):
        loss: Any = _ChunkedLoss.apply(head, tokens, states, *trained)
        return loss, n_units
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for some, wanted, weight in tokens.chunks():
        loss += _summed(losses_in_place(head.finish(head.output(states[some])), wanted), weight)
    return loss, n_units


@dataclass(frozen=True)
class SupervisedTokens:
    """The supervised tokens: their rows in the flat hidden states, what they should predict, how many at a time.

    weights: what the loss of each is multiplied by; None where all weigh 1.
    """

    rows: Tensor
    wanted: Tensor
    weights: Tensor | None
    at_a_time: int

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for start in range(0, len(self.rows), self.at_a_time):
            some = slice(start, start + self.at_a_time)
            yield self.rows[some], self.wanted[some], None if self.weights is None else self.weights[some]


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss; the forward pass computes the gradients, too, and the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, head: OutputHead, tokens: SupervisedTokens, hidden: Tensor, *trained: Tensor) -> Tensor:
        """hidden: (batch * seq, hidden). trained: the head's parameters that need gradients."""
        loss, gradients = loss_and_gradients(head, tokens, hidden, trained, of_hidden=ctx.needs_input_grad[2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place: a second backward pass through the same graph is an error that autograd reports."""
        gradients = ctx.saved_tensors
        scale_in_place(gradients, grad_outputs[0] / SCALE)
        return (None, None, *gradients)


def loss_and_gradients(
    head: OutputHead, tokens: SupervisedTokens, hidden: Tensor, trained: Sequence[Tensor], *, of_hidden: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed loss and SCALE times its gradients for `hidden` (None without of_hidden) and for `trained`."""
    of_states = torch.zeros_like(hidden) if of_hidden else None
    of_trained = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, wanted, weights in tokens.chunks():
        chunk = hidden.detach()[rows].requires_grad_(of_hidden)
        learned = [*([chunk] if of_hidden else []), *trained]
        part, gradients = _learn_chunk(head, chunk, wanted, weights, learned)
        loss += part
        if of_states is not None:
            of_states[rows] = gradients.pop(0)  # type: ignore[assignment]
        for whole in of_trained:
            gradient = gradients.pop(0)
            if gradient is not None:
                whole += gradient
            del gradient  # as large as the head: not two of them while the next chunk makes its own
    return loss, [of_states, *of_trained]


def scale_in_place(gradients: Sequence[Tensor | None], factor: Tensor) -> None:
    """In fp32, since the factor may be more than fp16 can hold; in pieces, since a long context is wide."""
    for gradient in gradients:
        for rows in row_pieces(gradient) if gradient is not None else ():
            rows.copy_(rows.float().mul_(factor))


def row_pieces(gradient: Tensor) -> tuple[Tensor, ...]:
    """Views of at most ROWS_AT_ONCE rows. A `TorchFunctionMode` sees the call: the plan traces a few of them."""
    if has_torch_function_unary(gradient):
        return handle_torch_function(row_pieces, (gradient,), gradient)
    return gradient.split(ROWS_AT_ONCE)


def _learn_chunk(
    head: OutputHead, hidden: Tensor, wanted: Tensor, weights: Tensor | None, learned: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed loss of a chunk and SCALE times its gradients for `learned`; None for what is not used."""
    # What is saved here is needed at once; to offload it would send a trained head's 16-bit copy to RAM for each chunk.
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        output = head.output(hidden)
    scores = output.detach()
    probabilities = head.finish(scores)
    loss = _summed(losses_in_place(probabilities, wanted), weights)
    probabilities[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
    if weights is not None:
        probabilities.mul_(weights[:, None])
    head.unfinish(probabilities.mul_(SCALE), scores)
    scores.copy_(probabilities)  # the gradient in the dtype and in the memory of the output that it belongs to
    del probabilities
    return loss, list(torch.autograd.grad(output, learned, scores, allow_unused=True))


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def losses_in_place(logits: Tensor, wanted: Tensor) -> Tensor:
    """Turn fp32 logits (tokens, vocab) into probabilities; return the losses (tokens,) of the `wanted` ids."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    of_wanted = logits.gather(1, wanted[:, None])
    total = logits.exp_().sum(dim=1, keepdim=True)
    logits.div_(total)
    return (total.log() - of_wanted).squeeze(1)


def _summed(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.sum() if weights is None else (losses * weights).sum()
