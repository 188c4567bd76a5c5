"""How far a tuned model has moved from its base: the Kullback-Leibler divergence of their next-token distributions.

Both are the same weights in memory; the base is the model with its adapter off. Logits exist for some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from onecard.model.output_head import OutputHead, logits_at, states_and_head

AdapterOff = Callable[[nn.Module], AbstractContextManager[None]]
"""Within it the model is its base."""
LogitsAt = Callable[[Tensor], Tensor]
"""The fp32 logits (n, vocab) of flat positions (n,) of a batch."""
_States = tuple[Tensor, OutputHead] | None
"""As `states_and_head` has them."""


@dataclass
class BaseStates:
    """What enters the head of the base for rows that were asked before, in RAM: a base does not change."""

    of_rows: dict[tuple[tuple[int, ...], ...], tuple[Tensor, torch.device, OutputHead]] = field(default_factory=dict)

    def find(
        self, model: nn.Module, rows: Sequence[Sequence[int]], inputs: dict[str, Any], base: AdapterOff
    ) -> _States:
        """The states and the head of the base for these rows, computed the first time."""
        key = tuple(map(tuple, rows))
        if key not in self.of_rows:
            found = _states(model, inputs, base)
            if found is None:
                return None
            self.of_rows[key] = (found[0].cpu(), found[0].device, found[1])
        states, device, head = self.of_rows[key]
        return states.to(device), head


def kl_from_base(
    model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff, known: BaseStates | None = None, *,
    chunk_tokens: int = 64,
) -> tuple[float, int]:  # fmt: skip
    """KL(base || model) in nats, summed over the tokens of `rows` that have a token before them, and their number.

    rows: token ids, one text each. known: keeps what the base is asked, for the next time. chunk_tokens: at most so
    many tokens have logits at a time, of each of the two.
    """
    inputs, predicting = _batch(rows, device)
    with torch.no_grad():
        states = _states(model, inputs, base) if known is None else known.find(model, rows, inputs, base)
        expected, found = _logits(model, inputs, base, states), _logits(model, inputs, None)
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


def _states(model: nn.Module, inputs: dict[str, Any], base: AdapterOff | None) -> _States:
    """Run the model, or with `base` its base, up to its head."""
    with nullcontext() if base is None else base(model):
        return states_and_head(model, inputs)


def _logits(model: nn.Module, inputs: dict[str, Any], base: AdapterOff | None, found: _States = None) -> LogitsAt:
    """What gives the logits of some positions of the model, or with `base` of its base; found: their `_states`."""

    def without_adapter(work: Callable[[], Any]) -> Any:
        with nullcontext() if base is None else base(model):
            return work()

    found = found or _states(model, inputs, base)
    if found is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        logits = without_adapter(lambda: logits_at(model, inputs, positions)).flatten(0, 1)
        return lambda chosen: logits[chosen.to(logits.device)].float()
    hidden, head = found
    states = hidden.flatten(0, 1)

    def of(chosen: Tensor) -> Tensor:
        return head.finish(head.output(states[chosen.to(states.device)]))

    # An adapter wraps what it changes; to switch all of them off and on for each chunk takes longer than a small head.
    is_plain = next(head.module.children(), None) is None
    return of if is_plain else lambda chosen: without_adapter(lambda: of(chosen))
