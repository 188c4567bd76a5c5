"""A base with one of PEFT's adapters on: the layers that can have one, how it is put on and taken off, its weights.

Knows modules and tensors by name. It does not know options or files (`adapter.py`, `peft_config.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import Tensor, nn

from onecard.errors import ConfigError, ModelError
from onecard.model.lora import vocabulary
from onecard.model.lora.formats import PREFIX
from onecard.model.lora.methods import is_adapter_weight
from onecard.model.lora.routing import LoraProduct
from onecard.model.lora.sparse import skip_drawing
from onecard.model.lora.targets import check_experts
from onecard.model.lora.virtual_tokens import VirtualTokens, check_base
from onecard.model.model_layers import linear_layers
from onecard.model.quantization import weight_bits

ADAPTER = "default"


class PromptedModel(VirtualTokens, PeftModelForCausalLM):
    """A base with virtual tokens in front of its texts."""


def adaptable_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers that plain peft gives an adapter by their name, and finds again in an adapter's files.

    In most mixtures of experts they are fewer than `linear_layers`: peft takes gate_proj, up_proj and down_proj for the
    experts', whatever layer they are asked for, so dense and shared layers of these names cannot be said.
    https://huggingface.co/docs/peft/developer_guides/lora (mixture of experts, transformers 5)
    """
    linear = linear_layers(model)
    taken = {name for name in {name.rsplit(".", 1)[-1] for name in linear} if _means_experts(model, name)}
    kept = {name: layer for name, layer in linear.items() if name.rsplit(".", 1)[-1] not in taken}
    # Renamed as transformers renames the base's own tensors when it loads them, some names become others'.
    files = {f"{PREFIX}{name}.lora_A.weight": torch.empty(0) for name in kept}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), files)
    return {name: layer for name, layer in kept.items() if f"{PREFIX}{name}.lora_A.weight" in found}


def _means_experts(model: Any, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that are fused into one tensor
        return True
    return name not in (config.target_modules or ())


def attach(model: Any, config: PeftConfig, *, has_no_memory: bool = False) -> PeftModel:
    """Put an adapter on. Raises what PEFT does (ValueError, TypeError); ConfigError for DoRA over 8 bits on a CPU."""
    linear = linear_layers(model).values()
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, None)  # older adapters name experts as layers
    if getattr(converted, "target_parameters", None):
        check_experts(model)
    if getattr(config, "use_dora", False) and any(
        layer.weight.device.type == "cpu" and weight_bits(layer) == 8 for layer in linear
    ):
        raise ConfigError(
            "--bits",
            "8 does not work with DoRA on CPU: peft loses the scales of 8-bit weights there; use --bits 4, 16 or 32",
        )
    if not has_no_memory:  # its adapter would get some
        skip_drawing(model, config)
    with warnings.catch_warnings():
        # Between peft and transformers, and of no use to the person who trains: peft asks under the old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")  # see `vocabulary.check_both_ends`
        peft_model = (
            _in_front(model, config)
            if config.is_prompt_learning
            else get_peft_model(model, config, low_cpu_mem_usage=has_no_memory)
        )
    for name, rank in peft_model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's: over 16-bit weights peft lets it be trained, but saves it nowhere
            rank.data = rank.data.float()
            rank.requires_grad_(False)
    if not any(weight_bits(layer) == 8 for layer in linear) and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # peft switches it on; see `load.py`
    return peft_model


def _in_front(model: Any, config: Any) -> PromptedModel:
    if (config.num_virtual_tokens or 0) < 1:
        raise ValueError(f"num_virtual_tokens={config.num_virtual_tokens} would train nothing; use 1 or more")
    check_base(model, config.peft_type.value.lower())
    config.base_model_name_or_path = base_name(model)  # as `get_peft_model` does
    peft_model = PromptedModel(model, config, ADAPTER)
    # Not where the plan builds models without memory: PEFT takes these numbers to the device of the vectors.
    peft_model.prompt_tokens[ADAPTER] = torch.arange(config.num_virtual_tokens, device="cpu")
    return peft_model


def remove_adapter(model: Any) -> Any:
    """Return the base without its adapter, ready for another one; a base alone is returned as it is."""
    if not isinstance(model, PeftModel):
        return model
    if isinstance(model, PromptedModel):
        return model.get_base_model()
    originals = vocabulary.untouched_modules(model.get_base_model())
    base: Any = model.unload()
    for name, module in originals.items():  # peft leaves the trained copies of whole modules in their place
        base.set_submodule(name, module)
    return base


def unwrap(model: Any) -> PeftModel:
    """Return the PeftModel inside DDP and the like. Raises ModelError when there is none."""
    while not isinstance(model, PeftModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter; call add_lora or load_adapter first")
    return model


def trained_part(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that an adapter brought into a model, by name; nothing for a base alone."""
    for name, parameter in model.named_parameters():
        if is_adapter_weight(name) or vocabulary.is_trained_vocabulary(name):
            yield name, parameter


def live_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    """The adapter's weights in the model, by their names in its files."""
    # save_embedding_layers: the default "auto" would ask the Hub for the base's vocabulary size.
    state = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in state.items()}


def give_memory(peft_model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Put `tensors` in the places of an adapter on the meta device, where peft itself would move them to the base."""
    state = peft_model.state_dict(keep_vars=True)
    places = get_peft_model_state_dict(peft_model, state, ADAPTER, save_embedding_layers=False)
    given = {id(places[name]): tensor for name, tensor in tensors.items()}
    # By identity: a tied pair is one tensor under two names.
    values = {key: given[id(place)] for key, place in state.items() if id(place) in given}
    first = getattr(peft_model.peft_config[ADAPTER], "init_r", 0)  # what AdaLoRA divides by is in no file
    ranks = {key: place for key, place in state.items() if ".ranknum." in key}
    values |= {key: torch.full_like(place, first, device="cpu") for key, place in ranks.items()}
    peft_model.load_state_dict(values, strict=False, assign=True)


def check_trainable(peft_model: PeftModel) -> None:
    """Raise ModelError where nothing would be trained, or not in fp32."""
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    if not trained:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(peft_model.get_base_model())})
        raise ModelError(f"0 trainable parameters: no adapter was attached; the linear layers are {', '.join(known)}")
    wrong = {parameter.dtype for parameter in trained} - {torch.float32}
    if wrong:
        raise ModelError(f"adapters must be fp32 to be trained, but some are {wrong}; please report this model")


def lora_products(model: PeftModel) -> dict[str, LoraProduct] | None:
    """What a plain LoRA adds to each linear layer, by the layer's name in the base; None for an adapter that is more.

    Only of layers that read a whole row: the head reads its last tokens, and experts those that are sent to them.
    """
    base: Any = model.get_base_model()
    found: dict[str, LoraProduct] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) is not LoraLinear or layer.lora_variant or layer is base.get_output_embeddings():
            return None
        above = name.split(".")[:-1]
        if any(hasattr(base.get_submodule(".".join(above[:k])), "experts") for k in range(1, len(above) + 1)):
            return None
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        if a.bias is not None or b.bias is not None:
            return None
        dtype = torch.float32 if a.weight.dtype.itemsize < 4 else a.weight.dtype  # as peft casts them
        product = LoraProduct(a.weight.detach().to(dtype), b.weight.detach().to(dtype), float(layer.scaling[ADAPTER]))
        found[name] = product
    return found if 2 * len(found) == len(live_tensors(model)) else None


def add_product(layer: Any, weight: Tensor) -> bool:
    """Add W += B A * scale to a weight of (out, in) in fp32, as `layer.merge` would, but without two more of its size.

    False, and nothing is done, for all but a plain LoRA on a linear layer.
    """
    if type(layer) is not LoraLinear or layer.lora_variant or layer.fan_in_fan_out or layer.merged:
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    factors: list[tuple[Any, Any, float]] = [
        (layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in active
    ]
    if any(part.weight.dtype != weight.dtype or part.bias is not None for a, b, _ in factors for part in (a, b)):
        return False
    for a, b, scale in factors:
        weight.addmm_(b.weight, a.weight, alpha=scale)
    return True


def base_name(model: Any) -> str:
    """Where a base came from, or its class."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
