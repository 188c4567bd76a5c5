"""Hypothetical cards, such as the one a person might buy, and the largest known model that fits on one.

Knows options and plans. Asks no device; `train/auto_config.py` describes the card that is there.
"""

from __future__ import annotations

import psutil
import torch

from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.model.allocator import has_expandable_segments
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.memory.architecture import architecture_of, known_models
from onecard.model.memory.estimate import GIB
from onecard.model.memory.plan import CardSpec, fits_somehow


def card_of_size(gib: float, *, is_old: bool = False) -> tuple[CardSpec, Hardware]:
    """A card of this size in this machine, as the plan sees it and as the choice of the number format does.

    is_old: of the Turing generation, without bf16.
    """
    name, size = f"a card of {gib:g} GiB", int(gib * GIB)
    card = CardSpec(name, size, psutil.virtual_memory().total, expandable_segments=has_expandable_segments())
    return card, Hardware(torch.device("cuda"), name, size, not is_old, None)


def element_bytes(config: FinetuneConfig, hardware: Hardware, model_type: str) -> int:
    """Bytes per number of the arithmetic. Raises ConfigError for what cannot work on this card."""
    return choose_dtype(config.model.dtype, config.model.bits, hardware, model_type)[0].itemsize


def largest_known(config: FinetuneConfig, card: CardSpec, hardware: Hardware) -> str | None:
    """The known model with the most weights that would fit with these options."""
    return next((name for name in reversed(known_models()) if fits_known(name, config, card, hardware)), None)


def fits_known(name: str, config: FinetuneConfig, card: CardSpec, hardware: Hardware) -> bool:
    """Whether this known model would fit; not one that cannot be trained in the card's number format."""
    model = architecture_of(name)
    try:
        width = element_bytes(config, hardware, model.model_type)
    except ConfigError:
        return False
    return fits_somehow(model, config, card, element_bytes=width)
