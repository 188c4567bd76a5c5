"""Base models of any size with random weights, made on the device and quantised layer by layer, for benchmarks.

A 14B model never exists in 16 bits and needs no disk: memory and speed do not depend on the values. What comes out is
built of the same modules, shapes, dtypes and bytes as what `load.load_base` makes of files (tests/test_benchmarks.py
compares them). Knows configs and modules; it does not know adapters, plans or what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.config.base_model import ModelOptions
from onecard.errors import ModelError
from onecard.model.attention import choose_kernel
from onecard.model.files import read_json
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.load import LoadedBase, checkpoint_layers, load_base
from onecard.model.memory.architecture import find_known
from onecard.model.model_layers import linear_layers
from onecard.model.quantization import quantize_linear

# Of https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json what differs from Llama-3.1-8B.
LLAMA_70B_CHANGES = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                     "num_attention_heads": 64}  # fmt: skip
STD = 0.02  # of random weights: activations then stay far inside fp16


def base_model(options: ModelOptions, hardware: Hardware, *, seed: int = 0) -> LoadedBase:
    """A directory's weights, or random ones for a model that is known by name (`tools/plan_memory.py --known`).

    Raises ModelError for anything else: a benchmark downloads nothing.
    """
    if Path(options.model_path).is_dir():
        return load_base(options, hardware)
    return random_base(config_of(options.model_path), options, hardware, seed=seed)


def config_of(model: str) -> dict[str, Any]:
    """The config numbers of a directory, of a config.json or of a known model. Raises ModelError."""
    if model == "Llama-3.1-70B":  # too large for any card that the list is for, but not for one that it streams through
        return config_of("Llama-3.1-8B") | LLAMA_70B_CHANGES
    if Path(model).is_file():
        return read_json(Path(model))
    if (Path(model) / "config.json").is_file():
        return read_json(Path(model) / "config.json")
    known = find_known(model)
    if known is None:
        raise ModelError(f"no model {model}; give a directory or one of those that tools/plan_memory.py --known lists")
    return known.config


def random_base(config: dict[str, Any], options: ModelOptions, hardware: Hardware, *, seed: int = 0) -> LoadedBase:
    """A frozen base of this config in `options.bits` on `hardware.device`, as `load_base` gives, of random weights.

    One linear layer at a time exists in 16 or 32 bits; embeddings, norms and head stay in the dtype of the arithmetic.
    With --stream_layers on the layers lie in RAM, for `stream_layers`.
    """
    device = hardware.device
    dtype, reason = choose_dtype(options.dtype, options.bits, hardware, str(config["model_type"]))
    built = transformers.CONFIG_MAPPING[config["model_type"]].from_dict({**config, **_no_dropout(config)})
    with torch.device("meta"), _default_dtype(dtype):
        model = _model_class(built, options.bits)(built)
    torch.manual_seed(seed)
    linears = linear_layers(model)
    _fill_the_rest(model, linears, device)
    while linears:  # which lets go of each layer once it is quantised
        name, module = linears.popitem()
        layer = _quantised(_random_layer(module, dtype, device), options.bits, dtype)
        model.set_submodule(name, layer.to("cpu") if options.stream_layers == "on" else layer)
    model.tie_weights()
    choose_kernel(model, hardware, dtype)
    model.requires_grad_(False)
    model.eval()
    if options.gradient_checkpointing:
        checkpoint_layers(model, reentrant=options.bits == 8)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"{type(model).__name__}: {left[0]} got no values; random_models.py cannot build this family")
    return LoadedBase(model, dtype, reason, f"random weights, seed {seed}")


def _model_class(config: PretrainedConfig, bits: int) -> type[PreTrainedModel]:
    """The family's class; for low bits one of the same name that says what `from_pretrained` would note on it.

    peft chooses its layers by that note: without it, it would wrap 4-bit layers as if they were plain ones.
    """
    family: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    note = {4: {"is_loaded_in_4bit": True}, 8: {"is_loaded_in_8bit": True}}.get(bits)
    return type(family.__name__, (family,), note) if note else family


def _fill_the_rest(model: PreTrainedModel, linears: dict[str, nn.Module], device: torch.device) -> None:
    """Give everything but the linear layers its memory and its values; rotary tables are no weights, but computed.

    A tied head has none of its own, not even for a while: the segment would stay with what is put into it.
    """
    head = model.get_output_embeddings() if model.config.get_text_config().tie_word_embeddings else None
    others = [module for name, module in model.named_modules() if name not in linears and module is not head]
    for module in others:
        module.to_empty(device=device, recurse=False)
    for module in others:
        # The hook that every family defines for values of its own; buffers that no file holds are among them.
        model._init_weights(module)


def _random_layer(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The layer with memory of its own and random values."""
    module.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, STD)
    return module


def _quantised(layer: nn.Module, bits: int, dtype: torch.dtype) -> nn.Module:
    if bits >= 16:
        return layer
    if isinstance(layer, Conv1D):
        raise ModelError("layers of GPT-2's kind are not built here in 4 or 8 bits; use --bits 16 or 32")
    return quantize_linear(layer, bits, dtype)  # type: ignore[arg-type]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in `dtype` inside, while tables that ask for fp32 themselves stay so, as in from_pretrained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _no_dropout(config: dict[str, Any]) -> dict[str, float]:
    return {name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)}
