"""SHiRA's places: which weights of a layer are trained, by row and column. PEFT keeps them in no buffer.

Knows PEFT's layers; on a model without memory (meta) it makes places in size alone, for the plan of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from peft.tuners.shira import ShiraLayer
from torch import Tensor, nn


def skip_drawing(model: nn.Module, config: Any) -> None:
    """Let PEFT draw no places among weights that have no memory."""
    if config.peft_type == PeftType.SHIRA and next(model.parameters()).is_meta:
        config.mask_fn = None


def sparse_places(module: nn.Module) -> dict[str, Tensor]:
    """The places (2, n), int32, of a layer by adapter; where none were drawn, as many of them without memory."""
    if not isinstance(module, ShiraLayer):
        return {}
    places: dict[str, Tensor] = module.shira_indices
    for name, weight in module.shira_weight.items():
        places.setdefault(name, torch.empty(2, len(weight), dtype=torch.int32, device="meta"))
    return places
