"""The methods of PEFT that are trained here: one table, by PEFT's own names.

Knows the settings that each method takes and how the tensors of its adapters are called. It imports no peft, so that
all can ask here which tensor is an adapter's: `adapter.py` makes the configuration of the class that PEFT registers
under the method's name. What an adapter takes of the card is counted on the real one (`model/memory/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onecard.config.training import LoraOptions
from onecard.errors import ConfigError

PISSA = "pissa_niter_16"  # randomised SVD, 16 iterations: seconds per layer instead of minutes, as PEFT recommends


@dataclass(frozen=True)
class AdaptedLayers:
    """What gets an adapter: layers and, in a mixture, tensors of experts. transposed: the layers store (in, out)."""

    modules: list[str]
    parameters: list[str] | None
    transposed: bool


@dataclass(frozen=True)
class PeftMethod:
    """How one method is configured, and what it makes of a layer."""

    settings: Callable[[LoraOptions, AdaptedLayers], dict[str, Any]]
    """What its configuration is made with, target_modules included."""
    prefix: str
    """What the names of its tensors begin with, as PEFT registers it."""
    zero: str
    """In the names of those that begin at zero, so that an untrained adapter changes nothing."""
    stored: Mapping[str, Any]
    """Settings of one that was trained: how it began no longer matters."""


def _lora(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": layers.modules,
        "target_parameters": layers.parameters,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "init_lora_weights": PISSA if options.lora_init == "pissa" else True,
        "fan_in_fan_out": layers.transposed,
    }


METHODS = {
    "lora": PeftMethod(_lora, prefix="lora_", zero="lora_B", stored={"init_lora_weights": True}),
}


def peft_settings(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    """The settings of the chosen method. Raises ConfigError where it cannot do what is asked for."""
    settings = METHODS[options.peft_method].settings(options, layers)
    if layers.parameters and not settings.get("target_parameters"):
        raise ConfigError("--lora_target_parameters", f"does not go with --peft_method {options.peft_method}")
    return settings


def layer_of(name: str) -> str | None:
    """The layer whose adapter this tensor belongs to; None for a tensor of no adapter.

    base_model.model.a.q_proj.lora_A.weight -> base_model.model.a.q_proj
    """
    for method in METHODS.values():
        before, found, _ = f".{name}".rpartition(f".{method.prefix}")
        if found:
            return before.removeprefix(".")
    return None


def is_adapter_weight(name: str) -> bool:
    """Whether this is the name of a tensor of an adapter, in a model or a file; rows of tokens are none."""
    return layer_of(name) is not None


def starts_at_zero(name: str) -> bool:
    """Whether this is the name of an adapter's tensor that begins at zero: B of LoRA."""
    return any(method.zero in name for method in METHODS.values())
