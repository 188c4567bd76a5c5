"""What some model types cannot do while they answer: padding on the left, beams, a static cache, reading in pieces.

Knows model types by name, as transformers 5.23 computes them; tests/model/test_every_family.py tries every other one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.errors import ConfigError
from onecard.inference.sampling import CacheOptions
from onecard.model.output_head import positions_in_front

ONE_ROW = ("rwkv",)  # rows beside each other are mixed up
NO_PADDING = ("deepseek_v4", "rwkv", "xlstm")  # their states take in what stands on the left, masked or not
NO_BEAMS = ("rwkv", "xlstm")  # a state cannot be handed from one beam to another
NO_STATIC_CACHE = ("deepseek_v4", "gpt_neo")  # an error in the one, other tokens in the other
NO_STATES = ("gemma3n", "gemma3n_text")  # the last hidden states that they give out are four at once


def check_generation(model: Any, n_rows: int, sampling: SamplingOptions, cache: CacheOptions) -> None:
    """Raise ConfigError, by its flag, for a way to answer that this model type does not have."""
    family = model.config.model_type
    if n_rows > 1 and family in ONE_ROW:
        raise ConfigError("--n", f"{n_rows} answers at once do not work with {family} models; ask for one at a time")
    if sampling.num_beams > 1 and family in NO_BEAMS:
        raise ConfigError("--num_beams", f"{sampling.num_beams} does not work with {family} models; use 1")
    if cache.static and positions_in_front(model):
        raise ConfigError("--static_cache", "does not work with virtual tokens, which lie in a cache; leave it off")
    if cache.static and family in NO_STATIC_CACHE:
        raise ConfigError("--static_cache", f"does not work with {family} models; leave it off")


def go_together(model: Any, lengths: Sequence[int]) -> bool:
    """Whether prompts of these lengths can be answered in one call."""
    family = model.config.model_type
    return len(lengths) < 2 or not (family in ONE_ROW or (family in NO_PADDING and len(set(lengths)) > 1))


def reads_in_pieces(model: Any) -> bool:
    """Whether a text can be read some tokens at a time, each piece after the cache of those before it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner, "_is_stateful", False) or inner.config.model_type in NO_STATES:
        return False
    return "past_key_values" in inspect.signature(type(inner).forward).parameters
