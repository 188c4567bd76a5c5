"""Attention without FlashAttention: the memory-efficient kernel, whatever the number of key heads.

Where queries share key heads (GQA), transformers asks SDPA to do the sharing, which only FlashAttention can. A Turing
card has none, and no card has one in fp32: both would fall back to the plain kernel, whose scores take
(heads, seq, seq). Here keys and values are repeated first,
which costs two hidden states of a layer and keeps the efficient kernel. Knows one function of transformers' attention
interface; does not know models. https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from onecard.model.hardware import Hardware

NAME, FAKE_SDPA = "onecard_sdpa", "onecard_sizes"
# In this order of preference; the plain kernel remains for shapes that the efficient one refuses.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_kernel(model: PreTrainedModel, hardware: Hardware, dtype: torch.dtype) -> None:
    """Let a model that computes in `dtype` avoid FlashAttention where this card has none for it."""
    if hardware.is_gpu and not hardware.has_flash_attention_in(dtype.itemsize):
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
    keys are those of all requests, that is quicker. Shapes as in `attend`.
    """
    cache, bias = options.get("cache"), options.get("position_bias")
    if cache is None or attention_mask is None or bias is not None or options.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, options.get("dropout", 0.0), scale=options.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def skip_packing_mask(model: PreTrainedModel) -> None:
    """Let a model without bytes leave its causal mask out where the real one does.

    transformers looks into the positions for several texts in one row, and takes them for there where it cannot look.
    """
    kind = getattr(model.config, "_attn_implementation", None)
    if kind not in ("sdpa", NAME):
        return
    name = f"{FAKE_SDPA}_{kind}"  # transformers looks it up at each call: models of both kinds may be held
    AttentionInterface.register(name, attend if kind == NAME else sdpa_attention_forward)
    AttentionMaskInterface.register(name, _mask_without_packing)
    model.set_attn_implementation(name)


def _mask_without_packing(*args: Any, **options: Any) -> Tensor | None:
    skip = options.get("allow_is_causal_skip", True) or not options.get("use_vmap", False)
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": skip})


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
