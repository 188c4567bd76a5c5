"""Attention without FlashAttention: the memory-efficient kernel, whatever the number of key heads.

Where queries share key heads (GQA), transformers asks SDPA to do the sharing, which only FlashAttention can. A Turing
card has none, and no card has one in fp32: both would fall back to the plain kernel, whose scores take
(heads, seq, seq). Here keys and values are repeated first,
which costs two hidden states of a layer and keeps the efficient kernel. Knows one function of transformers' attention
interface; does not know models. https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from onecard.model.hardware import Hardware

NAME = "onecard_sdpa"
# In this order of preference; the plain kernel remains for shapes that the efficient one refuses.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# What a call of the kernel for one request costs on a CPU, in products of a query's and a key's number: measured with 9
# heads of 64 (40 microseconds, 0.1 nanoseconds), 1 to 16 requests and 60 or 500 keys each.
_PRODUCTS_PER_CALL = 400_000


def choose_kernel(model: PreTrainedModel, hardware: Hardware, dtype: torch.dtype) -> None:
    """Let a model that computes in `dtype` avoid FlashAttention where this card has none for it."""
    if not hardware.has_flash_attention_in(dtype.itemsize):
        avoid_flash(model)


def avoid_flash(model: PreTrainedModel) -> bool:
    """Let `model` use the function below where it uses SDPA; False where it has an attention of its own."""
    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", NAME):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def allow_paged_cache(model: PreTrainedModel) -> None:
    """Let a model answer in transformers' continuous batching, which knows attention by its own names.

    "sdpa" is then a function below, for all models of this process: of `avoid_flash`, or one for CPUs.
    """
    kind = getattr(model.config, "_attn_implementation", None)
    if kind == NAME:
        AttentionInterface.register("sdpa", attend)
        model.set_attn_implementation("sdpa")
    elif kind == "sdpa" and model.device.type == "cpu":
        AttentionInterface.register("sdpa", attend_packed)


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' own function, which copies shared keys and values for each head where there is a mask.

    On a CPU the kernel reads them where they are, with the same result: for a packed row of continuous batching, whose
    keys are those of all requests, that is quicker. Where the keys of the others, which the mask takes away again, are
    many, each request reads its own alone. Shapes as in `attend`.
    """
    cache, bias = options.get("cache"), options.get("position_bias")
    if cache is None or attention_mask is None or bias is not None or options.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], attention_mask[..., queries, keys],
            options.get("dropout", 0.0), scale=options.get("scaling"), enable_gqa=True,
        ).transpose(1, 2)
        for queries, keys in _spans(options, query.shape[1] * query.shape[3])
    ]  # fmt: skip
    return torch.cat(parts, dim=1), None


def _spans(options: Mapping[str, Any], width: int) -> list[tuple[slice, slice]]:
    """The queries and keys of each request in a packed row of so many numbers a token; all, where that is quicker.

    options: has the cumulative lengths as `cache.update` leaves them, (requests + 1,) each.
    """
    query_ends, key_ends = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if query_ends is None or key_ends is None:
        return [(slice(None), slice(None))]
    queries, keys = ([slice(*ends) for ends in pairwise(side.tolist())] for side in (query_ends, key_ends))
    spans = list(zip(queries, keys, strict=True))
    n_own = sum((q.stop - q.start) * (k.stop - k.start) for q, k in spans)
    n_foreign = queries[-1].stop * keys[-1].stop - n_own
    return spans if n_foreign * width > _PRODUCTS_PER_CALL * len(spans) else [(slice(None), slice(None))]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without FlashAttention; `options` are those of transformers' own function.

    query (batch, heads, seq, dim), key and value (batch, key heads, seq, dim), attention_mask (batch, 1, seq, seq) or
    None for plain causal attention -> (batch, seq, heads, dim), None.
    """
    cache = options.pop("cache", None)
    if cache is not None:  # of continuous batching; an attention of its own has to fill it
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    n_groups = query.shape[1] // key.shape[1]
    if n_groups > 1:
        key, value = (side.repeat_interleave(n_groups, dim=1) for side in (key, value))
    # In the place of the module, since its `num_key_value_groups` would have them repeated once more.
    as_repeated: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    with sdpa_kernel(KERNELS) if query.device.type == "cuda" else nullcontext():
        out, _ = sdpa_attention_forward(as_repeated, query, key, value, attention_mask, **options)
    return out, None
