"""How much a PEFT method adds to a model, as PEFT makes it on the meta device: for the plan of memory.

Knows layers by name and size alone; it loads no model and takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from onecard.config.lora import LoraOptions
from onecard.model.lora.adapter import add_lora
from onecard.model.lora.methods import METHODS, AdaptedLayers
from onecard.model.lora.peft_config import as_config_error, new_config
from onecard.model.lora.sparse import skip_drawing, sparse_places


def method_tensors(
    options: LoraOptions, linears: Sequence[tuple[str, int, int]]
) -> tuple[list[list[int]], list[int], int]:
    """Numbers of weights that a method trains in each tensor, for each of these linear layers (name, n_in, n_out).

    Then bytes that lie beside them in each, and bytes that all layers share. Raises ConfigError, as `add_lora` does.
    """
    names = [f"{number}.{name}" for number, (name, _, _) in enumerate(linears)]
    with torch.device("meta"):
        layers: Any = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(n_in, n_out, bias=False)}) for name, n_in, n_out in linears
        )
        layers.config = {"model_type": ""}
        with as_config_error(options):
            config = replace(new_config(options, AdaptedLayers(names, None, transposed=False)), task_type=None)
            skip_drawing(layers, config)
            model = get_peft_model(layers, config)
    method = METHODS[options.peft_method]
    trained = [(name, tensor.numel()) for name, tensor in model.named_parameters() if tensor.requires_grad]
    beside = [(name, tensor.nbytes) for name, tensor in model.named_buffers()]
    beside += [(name, 2 * torch.float32.itemsize * size) for name, size in trained if method.scored]
    beside += [(f"{name}.", t.nbytes) for name, module in model.named_modules() for t in sparse_places(module).values()]
    shared = set(method.shared)
    of_all = [size for name, size in beside if shared & set(name.split("."))]
    own = [(name, size) for name, size in beside if not shared & set(name.split("."))]

    def in_layer(name: str, tensors: list[tuple[str, int]]) -> list[int]:
        return [size for tensor, size in tensors if f".{name}." in tensor]

    return [in_layer(name, trained) for name in names], [sum(in_layer(name, own)) for name in names], sum(of_all)


def whole_model_tensors(options: LoraOptions, config: Any, **own_code: Any) -> tuple[int, ...]:
    """Numbers of weights that are trained in each tensor, for a whole model of this configuration."""
    with torch.device("meta"):
        model = add_lora(AutoModelForCausalLM.from_config(config, **own_code), options)
    return tuple(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
