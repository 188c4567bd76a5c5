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

from onecard.config.lora import METHOD_SETTINGS, LoraOptions
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

    prefix: str
    """What the names of its tensors begin with, as PEFT registers it; empty for virtual tokens: no layer has them."""
    zero: tuple[str, ...]
    """Parts of the names of those that begin at zero, so that an untrained adapter changes nothing."""
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Settings of one that was trained: how it began no longer matters."""
    transposed: bool | None = False
    """Whether it goes over layers that store (in, out), Conv1D of GPT-2, by PEFT's fan_in_fan_out; None: without it."""
    shared: tuple[str, ...] = ()
    """Parts of the names of tensors that are not trained and that all layers use."""
    mergeable: bool = True
    """Whether it is merged here, layer by layer: what its files hold is enough for that."""
    scored: bool = False
    """Whether two numbers for each weight are kept beside it while it is trained."""
    alpha: str = ""
    """The setting to which all that it adds to the weights is proportional; empty: there is none."""
    own: Callable[[LoraOptions, AdaptedLayers], dict[str, Any]] = lambda options, layers: {}
    """Further settings of its configuration."""
    defaults: Callable[[LoraOptions], dict[str, Any]] = lambda options: {}
    """Settings that are others here than PEFT's, unless --peft_option gives them."""


def _lora(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {
        "target_parameters": layers.parameters, "use_rslora": options.use_rslora, "use_dora": options.use_dora,
        "init_lora_weights": MOVING_STARTS.get(options.lora_init, True),
    }  # fmt: skip


def _feedforward(_: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    return {"feedforward_modules": [name for name in layers.modules if name.rsplit(".", 1)[-1] in FEEDFORWARD]}


METHODS = {
    "lora": PeftMethod(
        "lora_", ("lora_B",), {"init_lora_weights": True}, transposed=True, alpha="lora_alpha", own=_lora
    ),
    "adalora": PeftMethod(
        "lora_", ("lora_E",), {"tinit": 0, "tfinal": 0, "rank_pattern": None}, transposed=True, scored=True,
        alpha="lora_alpha", own=lambda *_: {"r": 8, "total_step": UNKNOWN_STEPS},  # PEFT warns of another r, unused
        # Its authors begin with 1.5 times the rank that is left. How many steps there are is known later.
        defaults=lambda options: {"init_r": math.ceil(1.5 * options.lora_r)},
    ),
    "ia3": PeftMethod("ia3_", (), transposed=True, own=_feedforward),
    "vera": PeftMethod(
        "vera_lambda_", ("vera_lambda_b",), transposed=True, shared=("vera_A", "vera_B"),
        own=lambda *_: {"save_projection": True},
    ),
    "oft": PeftMethod("oft_", ("oft_R",)),
    "miss": PeftMethod("miss_", ("miss_block",)),
    "shira": PeftMethod("shira_", ("shira_weight",), mergeable=False),
    "randlora": PeftMethod(
        "randlora_", ("randlora_lambda",), transposed=True, shared=("randlora_A", "randlora_B"), mergeable=False,
        # PEFT would write the basis once for each layer; it makes the same one of its key again.
        own=lambda *_: {"save_projection": False},
    ),
    "loha": PeftMethod("hada_", ("hada_w2_b",), alpha="alpha"),
    "lokr": PeftMethod("lokr_", ("lokr_w1", "lokr_w1_a"), alpha="alpha"),
    "prompt_tuning": PeftMethod(
        "", (), {"prompt_tuning_init": "RANDOM", "tokenizer_kwargs": None}, transposed=None, mergeable=False,
        # As its authors found best for smaller models: vectors of words of the vocabulary. PEFT would draw them from a
        # distribution some fifty times as wide. https://arxiv.org/abs/2104.08691, figure 3
        defaults=lambda _: {"num_virtual_tokens": N_VIRTUAL_TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "p_tuning": PeftMethod(
        "", (), transposed=None, mergeable=False, defaults=lambda _: {"num_virtual_tokens": N_VIRTUAL_TOKENS}
    ),
    "prefix_tuning": PeftMethod(
        "", (), {"init_weights": None}, transposed=None, mergeable=False,
        # In PEFT's comparison a start at zero learned twice as much as its own, at random.
        defaults=lambda _: {"num_virtual_tokens": N_VIRTUAL_TOKENS, "init_weights": "zero"},
    ),
    "bottleneck": PeftMethod(
        "bottleneck_", ("bottleneck_up",), transposed=None, mergeable=False,
        # The scale of the parallel form is that of its authors.
        defaults=lambda options: {"scaling": 4.0} if options.peft_options.get("form") == "parallel" else {},
    ),
}  # fmt: skip


def peft_settings(options: LoraOptions, layers: AdaptedLayers) -> dict[str, Any]:
    """The settings of the chosen method. Raises ConfigError where it cannot do what is asked for."""
    method = METHODS[options.peft_method]
    settings = {theirs: getattr(options, ours) for ours, theirs in METHOD_SETTINGS[options.peft_method].items()}
    settings |= {"target_modules": layers.modules} if method.prefix else {}
    settings |= {"fan_in_fan_out": layers.transposed} if method.transposed else {}
    typed = options.peft_options
    settings |= {name: value for name, value in method.defaults(options).items() if name not in typed}
    settings |= method.own(options, layers)
    if layers.parameters and not settings.get("target_parameters"):
        raise ConfigError("--lora_target_parameters", f"does not go with --peft_method {options.peft_method}")
    if layers.transposed and method.transposed is False:
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
