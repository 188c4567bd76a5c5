"""Frozen input embeddings that stay in RAM: ids go there, rows come back to the card.

Whether it is worth it the plan decides (`model/memory/estimate.py`). No value changes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import ConfigError

# Embeddings that look up in RAM, so that a second call adds no second pair of hooks.
_looking_up: weakref.WeakKeyDictionary[nn.Module, list[torch.device]] = weakref.WeakKeyDictionary()


def embeddings_to_ram(model: nn.Module, device: torch.device | str) -> int:
    """Move the frozen input embedding into RAM; ids go there, rows (batch, seq, hidden) come back to `device`.

    Call it last, after adapters, DDP and accelerate have wrapped and moved the model; again after anything moved the
    model again. Returns the bytes freed on the card: 0 on a CPU, and 0 where the head computes with the same weight
    on the card (tied), which then stays where it is. Raises ConfigError for an embedding that is trained.
    The weight is not pinned: only looked-up rows travel, and these are a new tensor each time.
    """
    device = torch.device(device)
    base = _inside(model)
    embedding: Any = base.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        raise ConfigError(
            "--offload_embeddings",
            "cannot be used here: the embeddings are trained, and their gradients need them on the card; "
            "leave it off, or take the embeddings out of the trained modules",
        )
    head: Any = base.get_output_embeddings()
    weight = embedding.weight
    if head is not None and _same_memory(head.weight, weight):
        return 0
    freed = weight.untyped_storage().nbytes() if weight.device.type != "cpu" else 0
    if hasattr(embedding, "_hf_hook"):  # a model spread over several places: accelerate would move the ids back
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(embedding)
    embedding.to("cpu")
    if embedding not in _looking_up:
        _looking_up[embedding] = []
        embedding.register_forward_pre_hook(_ids_to_weight)
        embedding.register_forward_hook(_rows_to_device)
    _looking_up[embedding] = [device]
    return freed


def _inside(model: Any) -> Any:
    """The model inside DDP and the like; adapters pass questions for embeddings on by themselves."""
    while not hasattr(model, "get_input_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or 0 != one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _ids_to_weight(embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    place: Any = embedding.weight.device
    return tuple(value.to(place) if isinstance(value, Tensor) else value for value in inputs)


def _rows_to_device(embedding: nn.Module, _inputs: tuple[Any, ...], rows: Tensor) -> Tensor:
    return rows.to(_looking_up[embedding][0])
