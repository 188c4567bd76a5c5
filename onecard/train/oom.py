"""Running out of memory ends no run: what passes through the model at once is made smaller, and the step is done again.

A step is a set of samples, so its result does not depend on how it is cut. What is given up, in this order: what the
layers keep for the backward pass (they are computed again), half of the token budget until every row stands alone, half
of the loss's chunk, the layers' inputs (they go to RAM), MLPs in tiles.
Nothing is given back during a run: what did not fit once would fail again. Knows limits; does not know steps or
models' insides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onecard.data.batches import micro_batches
from onecard.data.packing import padded_tokens

SMALLEST_CHUNK = 64  # supervised tokens
SMALLEST_TILE = 256  # tokens
FIRST_TILE = 2048


@dataclass(frozen=True)
class MicroBatchLimits:
    """How much passes through the model at once; 0 is no limit."""

    micro_batch: int = 0
    """Rows."""
    micro_tokens: int = 0
    """Tokens, padding included."""
    loss_chunk: int = 0
    """Supervised tokens whose logits exist."""
    offload_activations: bool = False
    """The inputs of checkpointed layers wait in RAM."""
    mlp_tile: int = 0
    """Tokens in an MLP."""
    recompute_layers: bool = False
    """Layers are computed again in the backward pass, although the plan had them keep what they computed."""
    row_tokens: int = 0
    """Of the rows that samples share; 0: each is a row. No limit: what is too large for it stands alone."""

    @property
    def cut(self) -> dict[str, int]:
        """The part that decides how a step is cut, as `batches.micro_batches` takes it."""
        return {"micro_batch": self.micro_batch, "micro_tokens": self.micro_tokens, "row_tokens": self.row_tokens}


def smaller(
    limits: MicroBatchLimits, lengths: np.ndarray, *, can_offload: bool, can_recompute: bool = False
) -> tuple[MicroBatchLimits, str] | None:
    """The next smaller limits for samples of these lengths, and what changes in words; None when nothing is left.

    limits of 4,096 tokens, rows of 900: 3,600 at once (4 rows) become 1,800 (2 rows), then 900 (1 row), then the
    loss's chunk is halved.
    """
    if can_recompute and not limits.recompute_layers:
        return replace(limits, recompute_layers=True), "the layers are computed again in the backward pass from now on"
    longest = max(1, int(lengths.max()))
    at_once = max(
        padded_tokens(micro, lengths, limits.row_tokens)
        for micro in micro_batches(np.arange(len(lengths)), lengths, **limits.cut)
    )
    if at_once > longest:
        half = max(longest, at_once // 2)
        return replace(limits, micro_tokens=half), f"{half:,} tokens at once instead of {at_once:,}"
    most = min(limits.loss_chunk or at_once, at_once)
    if most // 2 >= SMALLEST_CHUNK:
        return replace(limits, loss_chunk=most // 2), f"logits of {most // 2} tokens at once instead of {most}"
    if can_offload and not limits.offload_activations:
        return replace(limits, offload_activations=True), "the inputs of the layers wait in RAM from now on"
    tile = limits.mlp_tile // 2 if limits.mlp_tile else min(FIRST_TILE, longest // 2)
    if tile >= SMALLEST_TILE:
        return replace(limits, mlp_tile=tile), f"MLPs take {tile} tokens at a time"
    return None
