"""Which layers and which expert tensors of a base get an adapter, by the names that a person types.

Knows names. It imports no peft: what peft makes of a name is asked by `adapter.py`, which passes the layers in.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from onecard.console import nearest
from onecard.errors import ConfigError, ModelError
from onecard.installation import command
from onecard.model.model_layers import expert_tensors, linear_layers

ALL_LINEAR, EXPERTS = "all-linear", "experts"


def target_modules(model: nn.Module, wanted: str, adaptable: dict[str, Any]) -> list[str]:
    """Check --lora_target_modules against the model; one wrong name among right ones is an error, too.

    adaptable: the layers that can have an adapter. Raises ModelError with the nearest names.
    """
    if wanted.strip() == ALL_LINEAR:
        if not adaptable:
            raise ModelError(f"{type(model).__name__} has no linear layers outside its head: nothing would be trained")
        # Short names make a config that people can read, and that does not silently fit half of a deeper base.
        short = sorted({name.rsplit(".", 1)[-1] for name in adaptable})
        others = (name for name, _ in model.named_modules() if name not in adaptable)
        return sorted(adaptable) if any(name.rsplit(".", 1)[-1] in short for name in others) else short
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    fitting = {name: _fitting(name, adaptable) for name in names}
    unknown = [name for name, layers in fitting.items() if not layers]
    if unknown or not names:
        raise ModelError(_no_layer(model, unknown, adaptable))
    every = [name for name, _ in model.named_modules()]
    # A short name that other layers share, such as those of a vision tower, is written out.
    return [
        target
        for name, layers in fitting.items()
        for target in ([name] if len(_fitting(name, every)) == len(layers) else sorted(layers))
    ]


def target_parameters(model: nn.Module, wanted: str) -> list[str] | None:
    """The full names of the expert tensors that --lora_target_parameters means; None where it is empty.

    Full names, as for the layers of a model that also sees. Raises ConfigError with what the model has, and for experts
    in 4 bits.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        return None
    check_experts(model)
    experts = [name for name, weight in expert_tensors(model).items() if weight.dim() == 3]  # peft knows no others
    found = {name: experts if name == EXPERTS else _fitting(name, experts) for name in names}
    wrong = [name for name, tensors in found.items() if not tensors]
    if wrong:
        known = sorted({".".join(name.rsplit(".", 2)[1:]) for name in experts})
        there = f"it has {', '.join(known)} ({EXPERTS} means all)" if known else "it has no experts"
        raise ConfigError(
            "--lora_target_parameters",
            f"{type(model).__name__} has no expert tensor {wrong[0]}{nearest(wrong[0], known)}; {there}",
        )
    return sorted({name for tensors in found.values() for name in tensors})


def check_experts(model: nn.Module) -> None:
    """Raise ConfigError for experts in 4 bits: peft would read them before its own part is added, and lose it."""
    if any(type(weight).__name__ == "Params4bit" for weight in expert_tensors(model).values()):
        raise ConfigError(
            "--bits",
            f"4 does not go with adapters on experts ({command('finetune')} --lora_target_parameters); 8 leaves "
            "them in 16 bits",
        )


def _fitting(name: str, every: Any) -> list[str]:
    return [full for full in every if full == name or full.endswith(f".{name}")]


def _no_layer(model: nn.Module, unknown: list[str], adaptable: dict[str, Any]) -> str:
    for name in unknown:
        if _fitting(name, linear_layers(model)):
            return (
                f"--lora_target_modules: {name} cannot be named in {type(model).__name__}, since peft takes that name "
                f"for the experts, which --lora_target_parameters {EXPERTS} trains. Leave it out"
            )
    known = sorted({name.rsplit(".", 1)[-1] for name in adaptable})
    listed = ", ".join(f"{name}{nearest(name, known)}" for name in unknown) or "nothing"
    return (
        f"--lora_target_modules names no linear layer of {type(model).__name__}: {listed}; it has "
        f"{', '.join(known)}. Nothing would be trained there"
    )
