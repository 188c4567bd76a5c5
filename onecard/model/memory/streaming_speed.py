"""How fast a run with streamed layers can be: what takes longer per layer, its copy or its arithmetic.

Knows sizes and two rates, which are assumed until a card has told its own. It does not know devices or plans.
"""

from __future__ import annotations

from dataclasses import dataclass

from onecard.model.memory.architecture import Architecture
from onecard.model.memory.estimate import MemoryConfig
from onecard.model.memory.tensor_sizes import streamed_layer_bytes

# Assumed, not measured: a card of 11 to 24 GB in a slot of PCIe 3.0 with 16 lanes, in 16-bit arithmetic.
COPY_BYTES_PER_S = 12e9
OPERATIONS_PER_S = 40e12


@dataclass(frozen=True)
class StreamingSpeed:
    """Of one micro-batch: how long a layer's copy takes, and its arithmetic forward and back; what comes of it."""

    copy_s: float
    forward_s: float
    backward_s: float
    """Of the layer computed again and its gradient for the input: frozen weights need no other."""
    tokens_per_s: float
    hidden_tokens: int
    """From so many tokens at once the copy hides behind the forward pass."""


def streaming_speed(
    model: Architecture,
    setup: MemoryConfig,
    copy_rate: float = COPY_BYTES_PER_S,
    operation_rate: float = OPERATIONS_PER_S,
) -> StreamingSpeed:
    """Training speed of layers that pass through the card: 2 x weights x tokens operations in each of three passes."""
    copy_s = streamed_layer_bytes(model, setup) / copy_rate
    n_weights = sum(each.n_weights for each in (*model.linears, *model.experts)) / model.n_layers
    per_token = 2 * n_weights / operation_rate
    forward_s, backward_s = per_token * setup.tokens, 2 * per_token * setup.tokens
    step_s = model.n_layers * (max(copy_s, forward_s) + max(copy_s, backward_s))
    return StreamingSpeed(copy_s, forward_s, backward_s, setup.tokens / step_s, round(copy_s / per_token))
