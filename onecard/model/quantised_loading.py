"""Weights that are quantised while transformers loads them: what it needs to know for that, and what it leaves out.

Knows transformers' quantizers and which layers they take. Does not know files (`load.py`), or how a weight looks in 4
or 8 bits (`quantization.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationMethod

from onecard.console import quiet_libraries
from onecard.model.model_layers import expert_tensors, quantised_layers
from onecard.model.out_of_memory import is_out_of_memory
from onecard.model.quantization import dequantise_when_read, nf4_parameter

QUANTIZER = "onecard_bitsandbytes"


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what transformers needs to load weights in `bits`: NF4 with double quantisation, LLM.int8, or None.

    The head and tied embeddings stay in `dtype`. https://arxiv.org/abs/2305.14314 https://arxiv.org/abs/2208.07339
    """
    return BitsAndBytesConfig(**_settings(bits, dtype)) if bits in (4, 8) else None


def loading_config(bits: int, dtype: torch.dtype, through: torch.device | None = None) -> BitsAndBytesConfig | None:
    """Return `quantization_config` for a model that stays in memory: more of it is quantised while it is loaded.

    Transformers leaves alone what is not exactly an nn.Linear. Here, too, are quantised: subclasses that compute the
    same (Falcon), layers that share their weights (Zamba) and, in 4 bits, the experts of a layer that lie in one
    tensor. Left in `dtype` are routers and what is read past `forward` (see `model_layers.py`). Saved, such a model
    could not be loaded by transformers alone. through: the device that quantises, wherever a weight is loaded to.
    """
    if bits not in (4, 8):
        return None
    quiet_libraries()  # for those who train without one of the programs, which do this first
    _register_quantizers()
    config = _LoadingConfig(**_settings(bits, dtype))
    config.through = str(through) if through is not None else None
    return config


def _settings(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    if bits == 8:
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype}  # fmt: skip


class _LoadingConfig(BitsAndBytesConfig):
    """By its name the registry of transformers finds the quantizers below."""

    through: str | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = f"{QUANTIZER}_{4 if self.load_in_4bit else 8}bit"


class _MoreLayers:
    """What `loading_config` adds to a quantizer of transformers: which layers it takes, and which it leaves."""

    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        # Chosen by now; transformers and accelerate ask by this name whether a model may be moved or cast.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES

    def _process_model_before_weight_loading(self: Any, model: Any, device_map: Any, **kwargs: Any) -> None:
        taken = quantised_layers(model)
        self.quantization_config.llm_int8_skip_modules = [
            name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and name not in taken
        ]
        for name, layer in taken.items():
            if type(layer) not in (nn.Linear, Conv1D):
                sizes = (layer.in_features, layer.out_features, layer.bias is not None)
                model.set_submodule(name, nn.Linear(*sizes, device="meta", dtype=layer.weight.dtype))
        self.experts = set(expert_tensors(model)) if self.quantization_config.load_in_4bit else set()
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)  # type: ignore[misc]

    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        for name in self.experts:
            path, _, leaf = name.rpartition(".")
            dequantise_when_read(model.get_submodule(path), leaf)
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]


class RanOutQuantizing(BaseException):
    """Memory ran out while a weight was quantised. No Exception: transformers collects those, and loads on."""


class _Through:
    """Quantises on the device that the config names, weight by weight, and puts the result where the weight came from.

    For models that do not fit there: a CPU's numbers may differ in the last digit, and it takes longer.
    """

    hf_quantizer: Any

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        try:
            return self._converted(input_dict, **kwargs)
        except (RuntimeError, MemoryError) as reason:
            if not is_out_of_memory(reason):
                raise
            raise RanOutQuantizing(str(reason)) from reason

    def _converted(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        through = self.hf_quantizer.quantization_config.through
        if through is None:
            return self.quantise(input_dict, **kwargs)
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            small = self.quantise({name: [weight.to(through)]}, **kwargs)
            found |= {key: each.to(weight.device) for key, each in small.items()}
        return found

    def quantise(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return super().convert(input_dict, **kwargs)  # type: ignore[misc]


@cache
def _register_quantizers() -> None:
    """Tell transformers of the quantizers behind `loading_config`, through its own registry; once per process.

    https://huggingface.co/docs/transformers/quantization/contribute
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    class Int8(_MoreLayers, Bnb8BitHfQuantizer):  # type: ignore[misc]
        def get_quantize_ops(self) -> Any:
            return QuantizeInt8(self)

    class NF4(_MoreLayers, Bnb4BitHfQuantizer):  # type: ignore[misc]
        def get_quantize_ops(self) -> Any:
            return QuantizeNF4(self)

    class QuantizeInt8(_Through, Bnb8bitQuantize):  # type: ignore[misc]
        pass

    class QuantizeNF4(_Through, Bnb4bitQuantize):  # type: ignore[misc]
        """One layer's experts at a time, so that never more than these lie on the card in 16 bits."""

        def quantise(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            experts = self.hf_quantizer.experts
            found: dict[str, Any] = {}
            for name, value in input_dict.items():
                if name not in experts:
                    found |= super().quantise({name: value}, **kwargs)
                    continue
                weight = value[0] if isinstance(value, list) else value
                found[name] = nf4_parameter(weight).to(weight.device)
            return found

    register_quantizer(f"{QUANTIZER}_8bit")(Int8)
    register_quantizer(f"{QUANTIZER}_4bit")(NF4)
