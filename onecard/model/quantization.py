"""Base weights in 4 or 8 bits and optimizers with 8-bit state: everything that touches bitsandbytes.

The only file that imports it, and only inside functions: a run with 16 or 32 bits never does. Knows tensors and
modules; does not know where weights come from (`load.py`) or what is trained on them (`adapters.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from onecard.console import ConfigError

OPTIMIZERS = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
# What `quiet_bitsandbytes` drops: parts of sentences, by the logger that says them.
IDLE_WORDS = {
    "bitsandbytes.autograd._functions": ("inputs will be cast",),
    "bitsandbytes.backends.cpu.ops": ("from kernels-community",),
    "torchao": ("Failed to load",),
    "torch.utils._pytree": ("is an Enum subclass",),
}


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what transformers needs to load weights in `bits`: NF4 with double quantisation, LLM.int8, or None.

    The head and tied embeddings stay in `dtype`. https://arxiv.org/abs/2305.14314 https://arxiv.org/abs/2208.07339
    """
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def quantized_linear_types() -> tuple[type[nn.Module], ...]:
    """The module classes whose weights lie in 4 or 8 bits."""
    import bitsandbytes

    return (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


def weight_bits(module: nn.Module) -> int:
    """Bits per weight of one linear layer: 4, 8, or those of its dtype."""
    kind = type(module).__name__
    if kind in ("Linear4bit", "Linear8bitLt"):
        return 4 if kind == "Linear4bit" else 8
    return module.weight.element_size() * 8  # type: ignore[operator]


def n_elements(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; a 4-bit one stores two in each byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def dequantize_4bit(parameter: torch.Tensor) -> torch.Tensor:
    """Return the weights (out, in) that a 4-bit parameter stands for, in fp32."""
    import bitsandbytes

    state: Any = parameter.quant_state  # type: ignore[attr-defined]
    return bitsandbytes.functional.dequantize_4bit(parameter.data, state).float()


def quantize_linear(module: nn.Linear, bits: Literal[4, 8], compute_dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy of a linear layer in `bits`, on the same device; `module` stays as it is.

    4: NF4 with double quantisation, computed in `compute_dtype`; about 0.516 bytes per weight. 8: LLM.int8 without
    outlier columns, computed in the dtype of its input; 1 byte per weight and 4 per row. Gradients reach the input.
    https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit
    """
    import bitsandbytes

    weight, device = module.weight.detach(), module.weight.device
    sizes = (module.in_features, module.out_features, module.bias is not None)
    layer: nn.Module
    small: Any
    if bits == 4:
        settings: Any = {"quant_type": "nf4", "compress_statistics": True}
        layer = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **settings)
        small = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **settings)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        small = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False)  # quantises on its way from the CPU only
    layer.register_parameter("weight", small.to(device))
    if module.bias is not None:
        layer.register_parameter("bias", nn.Parameter(module.bias.detach().clone(), requires_grad=False))
    if device.type == "cpu":
        keep_one_arithmetic_on_cpu(layer)
    return layer


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a layer's weights and of the constants of quantised ones."""
    total = sum(parameter.nbytes for parameter in module.parameters())
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        scales = [getattr(parameter, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
        if state is not None:
            scales += [state.absmax, state.code, state.offset]
            scales += [state.state2.absmax, state.state2.code] if state.nested else []
        total += sum(tensor.nbytes for tensor in scales if tensor is not None)
    return total


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class for adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit. Raises ConfigError."""
    if name == "adamw":
        return torch.optim.AdamW
    if name not in OPTIMIZERS:
        raise ConfigError("--optimizer", f"{name} is unknown; use adamw, {', '.join(OPTIMIZERS)}")
    import bitsandbytes

    return getattr(bitsandbytes.optim, OPTIMIZERS[name])


def allocate_bitsandbytes_state(optimizer: Any) -> None:
    """Give every parameter of a bitsandbytes optimizer its empty state now, not at its first step."""
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, position)


def keep_one_arithmetic_on_cpu(model: nn.Module) -> None:
    """Let quantised layers on a CPU compute in eval mode exactly as they do in train mode. Call it once, after loading.

    bitsandbytes repacks a 4-bit weight at its first forward in eval mode on CPUs with AVX512-BF16 and never back: from
    then on training would go through a kernel without gradients (evaluate once, and the layers below learn from wrong
    ones), and answers are rounded to bf16. 8-bit layers change to int8 arithmetic in eval mode. The flag that decides
    is the layer's own train mode, which means nothing else there, so it is set before each forward.
    """
    for module in model.modules():
        if isinstance(module, quantized_linear_types()):
            module.register_forward_pre_hook(_in_train_mode)


def _in_train_mode(module: nn.Module, _inputs: Any) -> None:
    module.train()


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Drop sentences of bitsandbytes, and of what peft imports with it, that nobody can act on; inside the block only.

    - At every layer of every step in 8 bits: that inputs are cast to fp16. The cast is the method.
    - When it is imported (peft does that) on a CPU with AVX512-BF16: that it cannot fetch a kernel for the packed
      weights which `keep_one_arithmetic_on_cpu` avoids. So import `adapters.py` inside the block, too.
    - When peft imports torchao, which gptqmodel brings along: that its kernels of other cards and Pythons do not load
      here, and that it uses torch in a way that will be an error some day.
    """

    def worth_saying(record: logging.LogRecord) -> bool:  # a new one each time, so that blocks may be nested
        return not any(words in str(record.msg) for words in IDLE_WORDS.get(record.name, ()))

    loggers = [logging.getLogger(name) for name in IDLE_WORDS]
    for logger in loggers:
        logger.addFilter(worth_saying)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(worth_saying)
