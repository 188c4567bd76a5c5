"""How much of what adapters change in a model's predictions other weights keep. Knows logits; no files, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOSS = 0.01  # of the effect; more is told, or refused where it is no rounding
CHUNK_PLACES = 8  # places whose predictions over a large vocabulary exist in fp64 at a time, in a few copies


@dataclass(frozen=True)
class AdapterEffect:
    """The adapters' effect on the predictions, and what is left of it with the adapters merged in."""

    kept: float
    """Share of the change of the log probabilities: the slope of the merged model's change over the adapters' own."""
    moved: float
    """Kullback-Leibler divergence from base + adapters to the base alone, nats per token."""
    apart: float
    """The same to the merged model."""
    n_same: int
    """Places where the likeliest token is the same with base + adapters and merged."""
    n_places: int

    @property
    def is_whole(self) -> bool:
        """At most 1 % lost or added on the whole, and at most 1 % of noise; False for NaN."""
        return abs(1 - self.kept) <= LARGEST_LOSS and self.apart <= LARGEST_LOSS * self.moved

    def __str__(self) -> str:
        return (
            f"{self.kept:.1%} of what the adapters change in the predictions is kept (KL divergence of base + adapters "
            f"{self.apart:.1e} from the result, {self.moved:.1e} from the base), and the likeliest token is the same "
            f"at {self.n_same} of {self.n_places} places"
        )


def effect_of(adapted: Sequence[Tensor], base: Sequence[Tensor | None], merged: Sequence[Tensor]) -> AdapterEffect:
    """Compare logits (places, rows) of base + adapters, of the base alone, and of the merged model, per prompt.

    None stands for a prompt with tokens that the base has no rows for. The slope is a least-squares fit weighted by
    the probabilities of base + adapters (the Fisher metric), to which a loss in the mean gain of NLL is proportional.
    """
    apart, moved, both, own, n_places, n_compared, n_same = 0.0, 0.0, 0.0, 0.0, 0, 0, 0
    for prompt, logits in enumerate(adapted):
        n_same += int((logits.argmax(-1) == merged[prompt].argmax(-1)).sum())
        n_places += len(logits)
        without = base[prompt]
        for places in torch.arange(len(logits)).split(CHUNK_PLACES):
            full = logits[places].double().log_softmax(-1)
            apart += _divergence(full, merged[prompt][places].double().log_softmax(-1))
            if without is None:
                continue
            # A vocabulary that grew or shrank: the rows that both have.
            rows = min(without.shape[-1], logits.shape[-1])
            wanted, found, start = (
                each[places, :rows].double().log_softmax(-1) for each in (logits, merged[prompt], without)
            )
            moved += _divergence(wanted, start)
            n_compared += len(places)
            share = wanted.exp()
            change, result = wanted - start, found - start
            change -= (share * change).sum(-1, keepdim=True)
            result -= (share * result).sum(-1, keepdim=True)
            both, own = both + float((share * change * result).sum()), own + float((share * change**2).sum())
    return AdapterEffect(both / own if own else 1.0, moved / max(n_compared, 1), apart / n_places, n_same, n_places)


def _divergence(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum())
