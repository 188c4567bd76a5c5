"""Bottleneck adapters: small networks behind or beside the sublayers of a frozen base, as a method of PEFT.

houlsby: behind attention and behind the feed-forward block, https://arxiv.org/abs/1902.00751
pfeiffer: behind the feed-forward block alone, https://arxiv.org/abs/2005.00247
parallel: beside the feed-forward block, scaled, https://arxiv.org/abs/2110.04366
PEFT has no such method, and the library of their authors, adapters 1.3.0, asks for transformers 4. After
`register_bottleneck` PEFT saves, loads and switches them as its own. They begin at zero, so that an untrained one
changes nothing; the norms of the base stay frozen, which Houlsby et al. trained, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from onecard.config.lora import BOTTLENECK_FORMS
from onecard.errors import ModelError
from onecard.installation import command
from onecard.model.lora.methods import METHODS
from onecard.model.model_layers import decoder_layers, expert_tensors, linear_layers

ATTENTION = re.compile("attn|attention")


class BottleneckType(str, Enum):
    """The kind in adapter_config.json, in the form of PEFT's own kinds, which nobody else can extend."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """adapter_config.json of bottleneck adapters."""

    form: str = field(default="pfeiffer", metadata={"help": "houlsby, pfeiffer or parallel: where they stand"})
    reduction_factor: float = field(default=16.0, metadata={"help": "width of the base divided by that of an adapter"})
    non_linearity: str = field(default="relu", metadata={"help": "activation between both matrices, by its name in "
                                                         "transformers"})  # fmt: skip
    scaling: float = field(default=1.0, metadata={"help": "what an adapter adds is multiplied by this"})
    dropout: float = field(default=0.0, metadata={"help": "of what goes into an adapter"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules that have one"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "what is trained and kept whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = BottleneckType.BOTTLENECK
        if self.form not in BOTTLENECK_FORMS:
            raise ValueError(f"form={self.form} is not one of {', '.join(BOTTLENECK_FORMS)}")
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"non_linearity={self.non_linearity} is no activation of transformers, such as relu, silu")
        if not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor={self.reduction_factor} is not above 0")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base, (batch, seq, in) -> (batch, seq, width), and width -> narrow -> width with it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.settings: dict[str, BottleneckConfig] = {}

    def update_layer(self, adapter: str, config: BottleneckConfig, width: int) -> None:
        """Add an adapter whose second matrix is zero, on the device of the layer."""
        narrow = max(1, int(width / config.reduction_factor))
        down, up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.settings[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter, next(self.base_layer.parameters()).device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer's, with what each active adapter adds."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in () if self.disable_adapters else self.active_adapters:
            if adapter in self.settings:
                out = out + self._added(adapter, x if self.settings[adapter].form == "parallel" else out).to(out.dtype)
        return out

    def _added(self, adapter: str, states: Tensor) -> Tensor:
        config = self.settings[adapter]
        down: Any = self.bottleneck_down[adapter]
        states = nn.functional.dropout(states.to(down.weight.dtype), config.dropout, self.training)
        narrow = ACT2FN[config.non_linearity](down(states))
        added: Tensor = self.bottleneck_up[adapter](narrow) * config.scaling
        return added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: no weight of the base computes what they do."""
        raise ValueError("bottleneck adapters cannot be merged: between their two matrices is a non-linearity")


class BottleneckModel(BaseTuner):
    """PEFT's part of a base with bottleneck adapters."""

    prefix = METHODS["bottleneck"].prefix
    tuner_layer_cls = BottleneckLayer

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        width = self.model.config.get_text_config().hidden_size
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, width)
            return
        layer = BottleneckLayer(target)
        layer.update_layer(adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: Any) -> None:
        """PEFT's own looks for the weight of a linear layer, and a whole block has none."""
        setattr(parent, child_name, new_module)


def register_bottleneck() -> None:
    """Make bottleneck adapters known to PEFT in this process; a second call changes nothing.

    PEFT's `register_peft_method` takes only the names of its own enumeration, so the entries are made here.
    """
    kind: Any = BottleneckType.BOTTLENECK
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, BottleneckConfig)
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, BottleneckModel)
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, BottleneckModel.prefix)


def bottleneck_places(model: Any, form: str) -> list[str]:
    """Names of the modules of a base that get an adapter: layers that its sublayers end with; parallel: whole blocks.

    Raises ModelError for a base that has no such places, before anything is trained.
    """
    if expert_tensors(model):
        raise _no_place(model, form, "is a mixture of experts, which has no one feed-forward block")
    names = {module: name for name, module in model.named_modules()}
    width = model.config.get_text_config().hidden_size
    ending = [name for name, layer in linear_layers(model).items() if _n_out(layer) == width]
    found = []
    for layer in decoder_layers(model):
        inside = f"{names[layer]}."
        own = [name.removeprefix(inside) for name in ending if name.startswith(inside)]
        attention = [name for name in own if ATTENTION.search(name.split(".")[0])]
        # Deeper than the layer's own block is a part of it, such as a shared expert.
        feedforward = [name for name in own if name not in attention and name.count(".") <= 1]
        places = feedforward[-1:] + attention[-1:] * (form == "houlsby")
        if form == "parallel":
            places = [name.split(".")[0] for name in places if "." in name]
        if len(places) < 1 + (form == "houlsby"):
            raise _no_place(model, form, f"has none of its blocks in {inside[:-1]}")
        found += [(inside, place) for place in places]
    if not found:
        raise _no_place(model, form, "has no decoder layers that can be told")
    return _short([inside + place for inside, place in found], {place for _, place in found}, list(names.values()))


def _short(full: list[str], places: set[str], every: list[str]) -> list[str]:
    """Names without the layer's own, where they mean these modules alone."""
    meant = [name for name in every if any(name.endswith(f".{place}") for place in places)]
    return sorted(places) if sorted(meant) == sorted(full) else sorted(full)


def _n_out(layer: Any) -> int:
    return int(layer.nf if hasattr(layer, "nf") else layer.out_features)


def _no_place(model: Any, form: str, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} {reason}, so {form} adapters have no place in it; train a LoRA adapter "
                      f"({command('finetune')} --peft_method lora)")  # fmt: skip
