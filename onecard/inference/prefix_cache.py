"""Keys and values of what the model has read, kept so that the next turn of a conversation reads only what is new.

A request takes over the cache whose token ids begin as its own prompt does, up to the first token that differs, as
vLLM's prefix caching and llama.cpp's prompt cache do. Knows token ids and caches of transformers. It does not know
conversations, or whose they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onecard.inference.model_limits import reads_in_pieces
from onecard.model.output_head import positions_in_front, takes_positions

MOST_KEPT = 16  # conversations; a search looks at each
LEAST_TOKENS = 8  # a shorter common beginning is read as fast as it is looked up
# Their rotations depend on the length of the whole text, so keys of a shorter text are not those of a longer one.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # others hold states besides keys and values
ROPES_OF_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class CachedPrefix:
    """The keys and values of these token ids, read by the model as this adapter."""

    adapter: str
    ids: list[int]
    cache: Any  # Cache, whose layers have no common type

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in (layer.keys, layer.values))


class PrefixCache:
    """Caches of the last conversations, the latest last, within so many GiB; 0 keeps none.

    Not locked: only the request that has the model uses it.
    """

    def __init__(self, gib: float) -> None:
        self._most_bytes = int(gib * 2**30)
        self._kept: list[CachedPrefix] = []

    def take(self, model: Any, adapter: str, ids: Sequence[int]) -> Cache | None:
        """A cache for a prompt of these ids, batch 1, which holds 0 to len(ids) - 1 of them; None: use no own cache."""
        if not self._most_bytes or not can_be_kept(model):
            return None
        best, n_best = None, LEAST_TOKENS - 1
        for kept in self._kept:
            n_common = n_same(kept.ids, ids[:-1])
            if kept.adapter == adapter and n_common > n_best and can_be_cut(kept.cache, n_common):
                best, n_best = kept, n_common
        if best is None:
            return new_cache(model)
        if 2 * n_best >= len(best.ids):  # the same conversation: its cache need not exist twice
            self._kept = [kept for kept in self._kept if kept is not best]
        return cut(best.cache, n_best)

    def keep(self, adapter: str, ids: Sequence[int], cache: Any) -> None:
        """Keep a cache of batch 1 whose first positions are these ids; it may hold more or fewer of them."""
        n_held = min((layer.get_seq_length() for layer in cache.layers), default=0)  # 0: left in its first pass
        n_tokens = min(n_held, len(ids))
        if n_tokens < LEAST_TOKENS or not can_be_cut(cache, n_tokens):
            return
        new = CachedPrefix(adapter, list(ids[:n_tokens]), cut(cache, n_tokens))
        others = [k for k in self._kept if k.adapter != adapter or n_same(k.ids, new.ids) < len(k.ids)]
        self._kept = [*others, new][-MOST_KEPT:]
        while sum(kept.n_bytes for kept in self._kept) > self._most_bytes:
            del self._kept[0]

    def clear(self) -> bool:
        """Let everything go; whether there was anything."""
        held, self._kept = bool(self._kept), []
        return held


def can_be_kept(model: Any) -> bool:
    """Whether a text can be continued behind the cached keys and values of its beginning, and these be cut.

    Not behind virtual tokens, whose keys and values stand in front of the text's own.
    """
    config = model.config.get_text_config(decoder=True)
    return (
        not positions_in_front(model)
        and reads_in_pieces(model)
        and model._supports_default_dynamic_cache()
        and all(type(layer) in PLAIN_LAYERS for layer in new_cache(model).layers)
        and not ropes_of(config.to_dict()) & set(ROPES_OF_LENGTH)
    )


def new_cache(model: Any) -> DynamicCache:
    """An empty cache, as `model.generate` would make it."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def ropes_of(settings: Any) -> set[str]:
    """The types of rotary position embeddings that a config names, of all its kinds of layers."""
    if not isinstance(settings, dict):
        return set()
    own = {str(settings.get("rope_type") or settings.get("type"))}
    return own.union(*(ropes_of(value) for value in settings.values()))


def can_be_cut(cache: Any, n_tokens: int) -> bool:
    """Whether the cache can be made one of its first `n_tokens`: a sliding window that was left holds no beginning."""
    return all(
        layer.get_seq_length() == n_tokens
        or not isinstance(layer, DynamicSlidingWindowLayer)
        or layer.get_seq_length() < layer.sliding_window
        for layer in cache.layers
    )


def cut(cache: Any, n_tokens: int) -> Cache:
    """The cache of the first `n_tokens`. It shares memory with the other; both stay right, as each grows by copying."""
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        if layer.get_seq_length() > n_tokens:
            layer.crop(n_tokens - layer.get_seq_length())
    return Cache(layers=layers)


def n_same(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    n_both = min(len(first), len(second))
    return next((n for n in range(n_both) if first[n] != second[n]), n_both)


def expanded(model: Any, ids: Sequence[int], cache: Any, n_rows: int) -> Cache:
    """Read the prompt up to its last token into `cache`, and give it out for a batch of `n_rows` equal prompts."""
    n_read = cache.get_seq_length()
    if n_read < len(ids) - 1:
        model(
            input_ids=torch.tensor([ids[n_read:-1]], device=model.device),
            attention_mask=torch.ones(1, len(ids) - 1, dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if takes_positions(model) else {}),
        )
    rows = cut(cache, len(ids) - 1)
    rows.batch_repeat_interleave(n_rows)
    return rows
