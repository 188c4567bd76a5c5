"""SHiRA's places: which weights of a layer are trained, by row and column. PEFT keeps them in no buffer.

Knows PEFT's layers by the names of what they hold; on a model without memory (meta) it makes places in size alone, for
the plan of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def skip_drawing(model: nn.Module, config: Any) -> None:
    """Let PEFT draw no places among weights that have no memory."""
    if hasattr(config, "mask_fn") and next(model.parameters()).is_meta:
        config.mask_fn = None


def sparse_places(module: nn.Module) -> dict[str, Tensor]:
    """The places (2, n), int32, of a layer by adapter; where none were drawn, as many of them without memory."""
    weights: Any = getattr(module, "shira_weight", {})
    places: Any = getattr(module, "shira_indices", {})
    for name, weight in weights.items():
        places.setdefault(name, torch.empty(2, len(weight), dtype=torch.int32, device="meta"))
    return places
