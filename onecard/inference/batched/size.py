"""How many answers are computed at once, and how much memory their keys and values get: known before the first request.

transformers would take 80 to 90 % of the free memory. Knows the shapes of a model and free memory; it does not know
requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from onecard.model.hardware import free_and_total_bytes
from onecard.model.rope_scaling import context_limit

GIB = 2**30
BLOCK_TOKENS = 32  # a common beginning is shared in whole blocks
STEP_TOKENS = 512  # of prompts and answers in one step; longer prompts are read in pieces
LEAST_STEP_TOKENS = 64
TOKENS_EACH = 4096  # of a request, where --kv_cache_gib leaves the choice
SHARE_OF_FREE = 0.5  # the rest is for the other path, its conversations and the arithmetic


@dataclass(frozen=True)
class BatchSize:
    """n_parallel answers at once over n_blocks blocks of keys and values, step_tokens tokens in a step."""

    n_parallel: int
    n_blocks: int
    step_tokens: int
    token_bytes: int
    reason: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.n_blocks * BLOCK_TOKENS

    def summary(self) -> str:
        """What is chosen and why, in a line."""
        gib = self.n_tokens * self.token_bytes / GIB
        return (
            f"up to {self.n_parallel} answers at once: keys and values of {self.n_tokens:,} tokens take {gib:.2f} GiB "
            f"({self.reason}), a step computes up to {self.step_tokens} tokens"
        )

    def smaller(self) -> BatchSize | None:
        """Half of it, after it did not fit into memory; None where it cannot be less."""
        if self.n_parallel == 1 and self.step_tokens == LEAST_STEP_TOKENS:
            return None
        n_parallel = max(1, self.n_parallel // 2)
        return replace(
            self,
            n_parallel=n_parallel,
            n_blocks=max(1, self.n_blocks * n_parallel // self.n_parallel),
            step_tokens=max(LEAST_STEP_TOKENS, self.step_tokens // 2),
            reason="less, after more did not fit into memory",
        )


def choose_size(model: Any, n_parallel: int, kv_cache_gib: float, prefix_cache_gib: float) -> BatchSize:
    """The size for this model and this machine; `kv_cache_gib` 0 leaves the memory to be chosen."""
    config = model.config.get_text_config(decoder=True)
    token_bytes = bytes_per_token(config, model.dtype)
    step_tokens = max(STEP_TOKENS, n_parallel)
    each = min(context_limit(config) or TOKENS_EACH, TOKENS_EACH)
    wanted = n_parallel * each
    if kv_cache_gib:
        n_tokens, reason = int(kv_cache_gib * GIB / token_bytes), "--kv_cache_gib"
    else:
        free = free_bytes(model.device)
        possible = int(max(free - prefix_cache_gib * GIB, 0) * SHARE_OF_FREE / token_bytes)
        n_tokens, reason = wanted, f"{each:,} tokens each"
        if possible < wanted:
            n_tokens, reason = possible, f"half of the {free / GIB:.1f} GiB that are free, beside --prefix_cache_gib"
    return BatchSize(n_parallel, max(1, n_tokens // BLOCK_TOKENS), step_tokens, token_bytes, reason)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Of keys and values in all layers."""
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * n_heads * head_dim * dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """What could be taken on this device."""
    return free_and_total_bytes(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
