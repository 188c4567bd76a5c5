"""The methods of PEFT that are trained here: one table, by PEFT's own names.

Knows the settings that each method takes and how the tensors of its adapters are called. It imports no peft, so that
all can ask here which tensor is an adapter's: `adapter.py` makes the configuration of the class that PEFT registers
under the method's name. What an adapter takes of the card is counted on the real one (`model/memory/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError

# pissa: randomised SVD, 16 iterations: seconds per layer instead of minutes, as PEFT recommends. Both take a part of
# the base's weights into the adapter.
MOVING_STARTS = {"pissa": "pissa_niter_16", "olora": "olora"}
UNKNOWN_STEPS = 2**31  # PEFT asks for a number; `rank_allocation.py` has the true one
# Of these layers (IA)3 scales what goes in, as its authors do; of all others what comes out.
FEEDFORWARD = ("down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out")
N_VIRTUAL_TOKENS = 20  # as in PEFT's examples; its authors saw little gain from more
PROMPT = ("prompt_encoder.", "prompt_embeddings")  # what names of virtual tokens begin with, in a model and in a file


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
    """What the names of its tensors begin with, as PEFT registers it; empty for virtual tokens: no layer has them."""
    zero: tuple[str, ...]
    """Parts of the names of those that begin at zero, so that an untrained adapter changes nothing."""
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Settings of one that was trained: how it began no longer matters."""
    transposed: bool = True
    """Whether it goes over layers that store (in, out): Conv1D of GPT-2."""
    shared: tuple[str, ...] = ()
    """Parts of the names of tensors that are not trained and that all layers use."""
    mergeable: bool = True
    """Whether it is merged here, layer by layer: what its files hold is enough for that."""
    scored: bool = False
    """Whether two numbers for each weight are kept beside it while it is trained."""
    alpha: str = ""
    """The setting to which all that it adds to the weights is proportional; empty: there is none."""


def _lora(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": layers.modules,
        "target_parameters": layers.parameters,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "init_lora_weights": MOVING_STARTS.get(options.lora_init, True),
        "fan_in_fan_out": layers.transposed,
    }


def _adalora(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    # Its authors begin with 1.5 times the rank that is left. How many steps there are is known later.
    first = {} if "init_r" in options.peft_options else {"init_r": math.ceil(1.5 * options.lora_r)}
    return {
        "r": 8, "target_r": options.lora_r, **first,  # PEFT warns of another r, which it does not use
        "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout,
        "target_modules": layers.modules, "total_step": UNKNOWN_STEPS, "fan_in_fan_out": layers.transposed,
    }  # fmt: skip


def _ia3(_: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    inside = [name for name in layers.modules if name.rsplit(".", 1)[-1] in FEEDFORWARD]
    return {
        "target_modules": layers.modules, "feedforward_modules": inside, "fan_in_fan_out": layers.transposed
    }  # fmt: skip


def _vera(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {
        "vera_dropout": options.lora_dropout, "target_modules": layers.modules, "save_projection": True,
        "fan_in_fan_out": layers.transposed,
    }  # fmt: skip


def _randlora(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    # PEFT would write the basis once for each layer; it makes the same one of its key again.
    return {
        "randlora_dropout": options.lora_dropout, "target_modules": layers.modules, "save_projection": False,
        "fan_in_fan_out": layers.transposed,
    }  # fmt: skip


def _miss(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {"miss_dropout": options.lora_dropout, "target_modules": layers.modules}


def _shira(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {"r": options.lora_r, "target_modules": layers.modules}


def _lycoris(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {"r": options.lora_r, "alpha": options.lora_alpha, "target_modules": layers.modules}


def _prompt_tuning(options: LoraOptions, _: AdaptedLayers) -> dict[str, Any]:
    # As its authors found best for smaller models: vectors of words of the vocabulary. PEFT would draw them from a
    # distribution some fifty times as wide. https://arxiv.org/abs/2104.08691, figure 3
    ours = {"num_virtual_tokens": N_VIRTUAL_TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"}
    return {name: value for name, value in ours.items() if name not in options.peft_options}


def _p_tuning(options: LoraOptions, _: AdaptedLayers) -> dict[str, Any]:
    return {} if "num_virtual_tokens" in options.peft_options else {"num_virtual_tokens": N_VIRTUAL_TOKENS}


def _prefix_tuning(options: LoraOptions, _: AdaptedLayers) -> dict[str, Any]:
    # In PEFT's comparison a start at zero learned twice as much as its own, at random.
    ours = {"num_virtual_tokens": N_VIRTUAL_TOKENS, "init_weights": "zero"}
    return {name: value for name, value in ours.items() if name not in options.peft_options}


def _bottleneck(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    # The scale of the parallel form is that of its authors.
    ours = {"scaling": 4.0} if options.peft_options.get("form") == "parallel" else {}
    kept = {name: value for name, value in ours.items() if name not in options.peft_options}
    return {"dropout": options.lora_dropout, "target_modules": layers.modules, **kept}


METHODS = {
    "lora": PeftMethod(_lora, "lora_", ("lora_B",), {"init_lora_weights": True}, alpha="lora_alpha"),
    "adalora": PeftMethod(
        _adalora, "lora_", ("lora_E",), {"tinit": 0, "tfinal": 0, "rank_pattern": None}, scored=True, alpha="lora_alpha"
    ),
    "ia3": PeftMethod(_ia3, "ia3_", ()),
    "vera": PeftMethod(_vera, "vera_lambda_", ("vera_lambda_b",), shared=("vera_A", "vera_B")),
    "oft": PeftMethod(lambda _, layers: {"target_modules": layers.modules}, "oft_", ("oft_R",), transposed=False),
    "miss": PeftMethod(_miss, "miss_", ("miss_block",), transposed=False),
    "shira": PeftMethod(_shira, "shira_", ("shira_weight",), transposed=False, mergeable=False),
    "randlora": PeftMethod(
        _randlora, "randlora_", ("randlora_lambda",), shared=("randlora_A", "randlora_B"), mergeable=False
    ),
    "loha": PeftMethod(_lycoris, "hada_", ("hada_w2_b",), transposed=False, alpha="alpha"),
    "lokr": PeftMethod(_lycoris, "lokr_", ("lokr_w1", "lokr_w1_a"), transposed=False, alpha="alpha"),
    "prompt_tuning": PeftMethod(
        _prompt_tuning, "", (), {"prompt_tuning_init": "RANDOM", "tokenizer_kwargs": None}, mergeable=False
    ),
    "p_tuning": PeftMethod(_p_tuning, "", (), mergeable=False),
    "prefix_tuning": PeftMethod(_prefix_tuning, "", (), {"init_weights": None}, mergeable=False),
    "bottleneck": PeftMethod(_bottleneck, "bottleneck_", ("bottleneck_up",), mergeable=False),
}


def peft_settings(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    """The settings of the chosen method. Raises ConfigError where it cannot do what is asked for."""
    method = METHODS[options.peft_method]
    settings = method.settings(options, layers)
    if layers.parameters and not settings.get("target_parameters"):
        raise ConfigError("--lora_target_parameters", f"does not go with --peft_method {options.peft_method}")
    if layers.transposed and not method.transposed:
        text = f"{options.peft_method} has no form for the Conv1D layers of this base; use lora, vera or ia3"
        raise ConfigError("--peft_method", text)
    return settings


def is_mergeable(peft_type: str) -> bool:
    """Whether an adapter of this kind (peft_type of adapter_config.json) can be merged here."""
    return METHODS[peft_type.lower()].mergeable


def why_never_merged(peft_type: str) -> str:
    """Why no weight of a base can hold what an adapter of this kind does, here or anywhere; else empty."""
    if not METHODS[peft_type.lower()].prefix:
        return "no weight of a base can hold what stands in front of every text"
    if peft_type.lower() == "bottleneck":
        return "no weight of a base can hold the non-linearity between its two matrices"
    return ""


def scale_adapter(config: Any, scale: float, directory: Any) -> list[str]:
    """Make PEFT's configuration of a trained adapter put it on `scale` times as strongly; what is not scaled is told.

    Raises ConfigError for a method whose change of the weights is no product with a number, such as DoRA.
    """
    if scale == 1:
        return []
    kind = config.peft_type.value.lower()
    alpha = METHODS[kind].alpha
    if not alpha or getattr(config, "use_dora", False):
        named = "DoRA" if alpha else kind
        scalable = ", ".join(name for name, method in METHODS.items() if method.alpha)
        raise ConfigError("--adapter_scale", f"{directory} is an adapter of the method {named}, which has no strength "
                          f"to scale; it goes with {scalable} (without DoRA)")  # fmt: skip
    setattr(config, alpha, getattr(config, alpha) * scale)
    config.alpha_pattern = {name: value * scale for name, value in (config.alpha_pattern or {}).items()}
    whole = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    return [f"--adapter_scale scales the change of layers; {name} of {directory} stays as trained" for name in whole]


def layer_of(name: str) -> str | None:
    """The layer whose adapter this tensor belongs to; None for a tensor of no adapter.

    base_model.model.a.q_proj.lora_A.weight -> base_model.model.a.q_proj
    prompt_embeddings -> "", for no layer
    """
    if name.startswith(PROMPT):
        return ""
    for method in (each for each in METHODS.values() if each.prefix):
        before, found, _ = f".{name}".rpartition(f".{method.prefix}")
        if found:
            return before.removeprefix(".")
    return None


def is_adapter_weight(name: str) -> bool:
    """Whether this is the name of a tensor of an adapter, in a model or a file; rows of tokens are none."""
    return layer_of(name) is not None


def starts_at_zero(name: str) -> bool:
    """Whether this is the name of an adapter's tensor that begins at zero: B of LoRA."""
    return any(part in method.zero for part in name.split(".") for method in METHODS.values())
