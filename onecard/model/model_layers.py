"""Which weights of a base are quantised and which get an adapter: one rule for loading, adapters and the plan.

Knows modules, plain, quantised or wrapped by PEFT. It does not know bits, adapters or PEFT's limits
(`model/lora/adapter.py`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

UNQUANTISED_SHARE = 0.05  # of the weights outside embeddings and head; below it nothing is said
# Subclasses of nn.Linear whose forward pass is nn.Linear's in other words.
LINEAR_TYPES = ("Linear4bit", "Linear8bitLt", "FalconLinear", "FewRowsLinear")
# Their layers choose tokens or experts, or the weights are read past `forward`: small, never quantised, no adapter.
CHOOSING = re.compile(r"Router|Gating|Indexer|AltUp|MoE\w*Gate$")
# The fused kernels of state-space layers read these weights directly: an adapter would be passed by in training.
READ_DIRECTLY = (
    (re.compile(r"^(Falcon)?MambaMixer$"), ("out_proj", "x_proj", "dt_proj")),
    (re.compile(r"(Mamba2|Bamba|FalconH1|Zamba2Mamba)Mixer$|HybridMambaLayer$"), ("out_proj",)),
    (re.compile(r"^JambaMambaMixer$"), ("dt_proj",)),
)
NOT_TEXT = re.compile(r"(^|\.)(vision|visual|image|audio|multi_modal|embed_tokens_extend|[a-z_]*adapter_list)")


def linear_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers of the text part that are quantised and can have an adapter, by name; the head not."""
    inside = text_part(model)
    return {
        name: layer
        for name, layer in quantised_layers(model).items()
        if name.startswith(inside) and not NOT_TEXT.search(name)
    }


def quantised_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers that lie in few bits where few are asked for, vision and sound included, by name.

    GPT-2's Conv1D is among them. Not: the head, and `kept_layers`.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept, adapters = kept_layers(model), inside_adapters(model)
    found = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and module not in adapters
    }
    return {name: module for name, module in found.items() if name not in kept}


def inside_adapters(model: nn.Module) -> set[nn.Module]:
    """What PEFT has put beside the layers that it wraps: all that is in a wrapper and not in its base_layer."""
    children = [dict(module.named_children()) for module in model.modules()]
    beside = [each for own in children if "base_layer" in own for name, each in own.items() if name != "base_layer"]
    return {module for each in beside for module in each.modules()}


def kept_layers(model: nn.Module) -> set[str]:
    """Names of linear layers that stay as they are: neither quantised nor adapted."""
    found = set()
    for path, parent in model.named_modules():
        kind, prefix = type(parent).__name__, f"{path}." if path else ""
        if CHOOSING.search(kind):
            found |= {path, *(f"{prefix}{name}" for name, _ in parent.named_modules() if name)}
        for kinds, names in READ_DIRECTLY:
            if kinds.search(kind):
                found |= {f"{prefix}{name}" for name in names}
    return {name.removesuffix(".base_layer") for name in found}


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of experts that lie in one tensor for all experts of a layer, by name.

    Mostly (experts, ., .); DBRX writes (experts x ., .). Where they lie quantised, the parameter is the packed one.
    """
    return {
        f"{path}.{name}".replace(".base_layer", ""): weight
        for path, module in model.named_modules()
        if "Expert" in type(module).__name__
        for name, weight in _own_weights(module)
        if weight.dim() > 1 and "bias" not in name
    }


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a causal language model, in order; none where they cannot be told."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return list(stacks[0]) if stacks else []


def text_part(model: Any) -> str:
    """The path of the text decoder inside a model that also sees or hears; empty for a model of text alone."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # the latter is part of torch's own attention, which reads its weights directly
    return type(module).forward is nn.Linear.forward or type(module).__name__ in LINEAR_TYPES


def _own_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of this module alone; those that lie quantised are under `parametrizations`."""
    own = list(module.named_parameters(recurse=False))
    quantised: Any = getattr(module, "parametrizations", {})
    return own + [(name, each.original) for name, each in quantised.items()]
