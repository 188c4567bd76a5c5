"""The output head in 4 or 8 bits: the largest matrix of a small model with a large vocabulary, made smaller.

Knows which layer is the head and how it may be tied to the embeddings. It does not know the arithmetic of bits
(`quantization.py`), the loss (`model/chunked_loss.py`) or whether the card needs any of this (the memory plan).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from onecard.errors import ConfigError, ModelError
from onecard.model.memory_saving.tiled_head import dequantise_in_tiles
from onecard.model.model_config import HEAD_READ_DIRECTLY
from onecard.model.quantization import quantize_linear, quantized_linear_types, stored_bytes, weight_bits


def quantize_head(model: PreTrainedModel, bits: Literal[4, 8], compute_dtype: torch.dtype) -> int:
    """Replace the head of a base model by a frozen copy in 4 (NF4) or 8 bits; return the bytes saved on its device.

    Call it after loading and before adapters are attached. A head tied to the embeddings gets its own copy while the
    embeddings stay as they are, so the number is negative: it pays where the embeddings then move into RAM. The model
    is told that the two are no longer tied, because transformers would otherwise tie them again.

    Raises ConfigError for a head that is trained, has these or other low bits already in part, is spread over devices,
    or whose weights the model reads itself; ModelError for a model without a linear head.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head that can be quantised; leave --head_bits at 16")
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ConfigError(
            "--head_bits", f"{bits} does not go with a head that is trained: quantised weights cannot learn; use 16"
        )
    if model.config.model_type in HEAD_READ_DIRECTLY:
        raise ConfigError("--head_bits", f"{bits} does not work with {model.config.model_type} models; use 16")
    if isinstance(head, quantized_linear_types()):
        if weight_bits(head) == bits:
            return 0
        raise ConfigError("--head_bits", f"{bits} is asked for, but the head lies in {weight_bits(head)} bits already")
    if type(head) is not nn.Linear:
        raise ModelError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a linear layer")
    if hasattr(head, "_hf_hook"):
        raise ConfigError("--head_bits", f"{bits} does not go with --max_memory: the head is placed by accelerate")
    tied = _is_tied(model, head)
    quantised = quantize_linear(head, bits, compute_dtype)
    quantised.train(head.training)
    dequantise_in_tiles(quantised)
    before = stored_bytes(head) - (head.weight.nbytes if tied else 0)
    model.set_output_embeddings(quantised)
    for config in (model.config, model.config.get_text_config()):
        config.update({"tie_word_embeddings": False})
    return before - stored_bytes(quantised)


def _is_tied(model: PreTrainedModel, head: nn.Linear) -> bool:
    embeddings: Any = model.get_input_embeddings()
    return embeddings is not None and embeddings.weight is head.weight
