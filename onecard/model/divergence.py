"""How far a tuned model has moved from its base: the Kullback-Leibler divergence of their next-token distributions.

Both are the same weights in memory; the base is the model with its adapter off. Logits exist for some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from onecard.model.output_head import logits_at, states_and_head

AdapterOff = Callable[[nn.Module], AbstractContextManager[None]]
"""Within it the model is its base."""
LogitsAt = Callable[[Tensor], Tensor]
"""The fp32 logits (n, vocab) of flat positions (n,) of a batch."""


def kl_from_base(
    model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff, *, chunk_tokens: int = 64
) -> tuple[float, int]:
    """KL(base || model) in nats, summed over the tokens of `rows` that have a token before them, and their number.

    rows: token ids, one text each. chunk_tokens: at most so many tokens have logits at a time, of each of the two.
    """
    inputs, predicting = _batch(rows, device)
    with torch.no_grad():
        expected, found = _logits(model, inputs, base), _logits(model, inputs, None)
        return _summed_kl(expected, found, predicting, predicting, chunk_tokens), len(predicting)


def kl_loss(
    model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff, *, chunk_tokens: int = 32
) -> tuple[Tensor, int]:
    """As `kl_from_base`, differentiable: a scalar, fp32. Logits are computed again for the gradient, not kept."""
    inputs, predicting = _batch(rows, device)
    with torch.no_grad():
        expected = _logits(model, inputs, base)
    found = _logits(model, inputs, None)

    def of_chunk(some: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = expected(some).log_softmax(dim=1)
        return (log_p.exp() * (log_p - found(some).log_softmax(dim=1))).sum()

    chunks = [checkpoint(of_chunk, some, use_reentrant=False) for some in predicting.split(chunk_tokens)]
    return torch.stack(chunks).sum().to(device), len(predicting)


def kl_of_rounding(
    model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff, *, chunk_tokens: int = 64
) -> tuple[float, int]:
    """As `kl_from_base`, of the base from itself: all rows in one batch against each row alone.

    The same mathematics in other shapes; what is left is rounding, below which no divergence means anything.
    """
    inputs, predicting = _batch(rows, device)
    width, total = inputs["input_ids"].shape[1], 0.0
    with torch.no_grad():
        together = _logits(model, inputs, base)
        for number, row in enumerate(rows):
            own, positions = _batch([row], device)
            total += _summed_kl(
                together, _logits(model, own, base), positions + number * width, positions, chunk_tokens
            )
    return total, len(predicting)


def _batch(rows: Sequence[Sequence[int]], device: Any) -> tuple[dict[str, Any], Tensor]:
    """The inputs of rows (padded on the right), and the flat positions whose next token is a real one."""
    ids = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    predicts = torch.arange(1, ids.shape[1] + 1, device=device) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": None, "use_cache": False}
    return inputs, predicts.flatten().nonzero().squeeze(1)


def _summed_kl(expected: LogitsAt, found: LogitsAt, of_expected: Tensor, of_found: Tensor, chunk_tokens: int) -> float:
    total = 0.0
    for here, there in zip(of_expected.split(chunk_tokens), of_found.split(chunk_tokens), strict=True):
        log_p, log_q = expected(here).log_softmax(dim=1), found(there).log_softmax(dim=1)
        total += float(log_p.exp().mul_(log_p.sub_(log_q)).sum(dtype=torch.float64))
    return total


def _logits(model: nn.Module, inputs: dict[str, Any], base: AdapterOff | None) -> LogitsAt:
    """Run the model, or with `base` its base, up to its head; return what gives the logits of some of its positions."""

    def without_adapter(work: Callable[[], Any]) -> Any:
        if base is None:
            return work()
        with base(model):
            return work()

    found = without_adapter(lambda: states_and_head(model, inputs))
    if found is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        logits = without_adapter(lambda: logits_at(model, inputs, positions)).flatten(0, 1)
        return lambda chosen: logits[chosen.to(logits.device)].float()
    hidden, head = found
    states = hidden.flatten(0, 1)

    def of(chosen: Tensor) -> Tensor:
        return without_adapter(lambda: head.finish(head.output(states[chosen.to(states.device)])))

    return of
