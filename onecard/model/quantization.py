"""Base weights in 4 or 8 bits and optimizers with 8-bit state: everything that touches bitsandbytes.

The only file that imports it, and only inside functions: a run with 16 or 32 bits never does. Knows tensors and
modules; does not know how weights come from files (`quantised_loading.py`) or what is trained on them
(`model/lora/adapter.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers.pytorch_utils import Conv1D

from onecard.errors import ConfigError
from onecard.model.model_layers import expert_tensors, quantised_layers

NF4_SETTINGS: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
# With double quantisation (arXiv:2305.14314): an 8-bit scale for each 64 weights, an fp32 one for each 256 scales.
NF4_BLOCK, NF4_SUPERBLOCK = 64, 256
OPTIMIZERS = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}


def dequantise_when_read(module: nn.Module, name: str) -> None:
    """Let a 4-bit parameter of any shape be its 16-bit self for the length of the module's forward pass.

    As bitsandbytes' replace_parameter_4bit, which starts from 16 bits, but for one copy of the scales instead of two.
    """
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks

    state: Any = getattr(module, name).quant_state
    register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)  # dequantised once per forward pass, however often it is read


def quantized_linear_types() -> tuple[type[nn.Module], ...]:
    """The module classes whose weights lie in 4 or 8 bits."""
    import bitsandbytes

    return (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


def weight_bits(module: nn.Module) -> int:
    """Bits per weight of one linear layer: 4, 8, or those of its dtype."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    for name, bits in (("Linear4bit", 4), ("Linear8bitLt", 8)):
        if name in kinds:
            return bits
    return module.weight.element_size() * 8  # type: ignore[operator]


def n_elements(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; a 4-bit one stores two in each byte, and DeepSpeed's ZeRO-3 leaves it empty."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def dequantize_4bit(parameter: torch.Tensor) -> torch.Tensor:
    """Return the weights (out, in) that a 4-bit parameter stands for, in fp32."""
    import bitsandbytes

    state: Any = parameter.quant_state  # type: ignore[attr-defined]
    return bitsandbytes.functional.dequantize_4bit(parameter.data, state).float()


def product_with_rows(layer: Any, x: torch.Tensor, rows: slice) -> torch.Tensor:
    """What a frozen quantised layer makes of x (..., in) with these of its rows alone: (..., rows), in the dtype of x.

    Of a 4-bit layer rows.start times its width must be a multiple of NF4_BLOCK * NF4_SUPERBLOCK.
    """
    import bitsandbytes

    bias = None if layer.bias is None else layer.bias[rows]
    if weight_bits(layer) == 4:
        packed, state = _packed_rows(layer.weight, rows)
        given = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
        bias = None if bias is None else bias.to(given.dtype)
        return bitsandbytes.matmul_4bit(given, packed, state, bias=bias).to(x.dtype)
    state = _int8_state(layer)
    part = type(state)()
    part.CB, part.SCB, part.has_fp16_weights, part.threshold = state.CB[rows], state.SCB[rows], False, state.threshold
    part.is_training = layer.training
    return bitsandbytes.matmul(x, part.CB, state=part, bias=None if bias is None else bias.to(x.dtype))


def dense_rows(layer: Any, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """The weights (rows, in) that these rows of a frozen quantised layer stand for; see `product_with_rows`.

    In the dtype that a 4-bit layer computes in, or in `dtype`.
    """
    import bitsandbytes

    if weight_bits(layer) == 4:
        weights = bitsandbytes.functional.dequantize_4bit(*_packed_rows(layer.weight, rows))
        return weights.to(layer.compute_dtype or dtype)
    state = _int8_state(layer)
    return state.CB[rows].to(dtype, copy=True).mul_(state.SCB[rows, None].mul(1.0 / 127.0))


def _packed_rows(weight: Any, rows: slice) -> tuple[torch.Tensor, Any]:
    """Some rows of a 4-bit weight, packed, and their constants: views."""
    from bitsandbytes.functional import QuantState

    state = weight.quant_state
    first, last = (edge * state.shape[1] for edge in (rows.start, rows.stop))
    blocks = slice(first // NF4_BLOCK, -(-last // NF4_BLOCK))
    scales = slice(blocks.start // NF4_SUPERBLOCK, -(-blocks.stop // NF4_SUPERBLOCK))
    double = state.state2
    outer = QuantState(double.absmax[scales], blocksize=double.blocksize, code=double.code, dtype=double.dtype)
    inner = QuantState(state.absmax[blocks], torch.Size((rows.stop - rows.start, state.shape[1])), state.code,
                       state.blocksize, state.quant_type, state.dtype, state.offset, outer)  # fmt: skip
    return weight.data.view(-1, 1)[first // 2 : -(-last // 2)], inner


def _int8_state(layer: Any) -> Any:
    """Where an 8-bit layer keeps its weights, which bitsandbytes moves there at the first call."""
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    return layer.state


def quantize_linear(module: nn.Linear, bits: Literal[4, 8], compute_dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy of a linear layer in `bits`, on the same device; `module` stays as it is.

    4: NF4 with double quantisation, computed in `compute_dtype`; about 0.516 bytes per weight. 8: LLM.int8 without
    outlier columns, computed in the dtype of its input; 1 byte per weight and 4 per row. Gradients reach the input.
    Of a layer on the meta device the copy has its sizes and no values, either.
    https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit
    """
    import bitsandbytes

    weight, device = module.weight.detach(), module.weight.device
    sizes = (module.in_features, module.out_features, module.bias is not None)
    layer: nn.Module
    small: Any
    if bits == 4:
        layer = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **NF4_SETTINGS)
        small = nf4_parameter(weight, module=layer)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        # Quantises on its way from the CPU only.
        small = bitsandbytes.nn.Int8Params(weight if weight.is_meta else weight.cpu(), requires_grad=False)
    if weight.is_meta:
        small = _without_values(weight, bits, compute_dtype)
    layer.register_parameter("weight", small if weight.is_meta else small.to(device))
    if module.bias is not None:
        layer.register_parameter("bias", nn.Parameter(module.bias.detach().clone(), requires_grad=False))
    if device.type == "cpu":
        keep_one_arithmetic_on_cpu(layer)
    return layer


def quantize_on_meta(model: Any, bits: int, compute_dtype: torch.dtype) -> None:
    """Give a model on the meta device the layers that `loading_config` would give it; 16 and 32 change nothing."""
    if bits not in (4, 8):
        return
    for name, layer in quantised_layers(model).items():
        n_out, n_in = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        plain = nn.Linear(n_in, n_out, layer.bias is not None, device="meta", dtype=layer.weight.dtype)
        model.set_submodule(name, quantize_linear(plain, bits, compute_dtype))  # type: ignore[arg-type]
    for name, weight in expert_tensors(model).items() if bits == 4 else ():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.register_parameter(leaf, _without_values(weight, 4, compute_dtype))
        dequantise_when_read(module, leaf)
    # The notes by which peft chooses its layers.
    setattr(model, f"is_loaded_in_{bits}bit", True)


def _without_values(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> Any:
    """What quantising `weight` gives, on the meta device."""
    import bitsandbytes

    def sized(n_values: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n_values, dtype=kind, device="meta")

    if bits == 8:
        small = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        return bitsandbytes.nn.Int8Params(small, requires_grad=False, CB=small, SCB=sized(len(weight)))
    n_blocks = -(-weight.numel() // NF4_BLOCK)
    scales = bitsandbytes.functional.QuantState(
        sized(-(-n_blocks // NF4_SUPERBLOCK)), blocksize=NF4_SUPERBLOCK, code=sized(256), dtype=torch.float32
    )
    state = bitsandbytes.functional.QuantState(
        sized(n_blocks, torch.uint8), weight.shape, sized(16), NF4_BLOCK, "nf4", dtype, sized(1)[0], scales
    )
    packed = sized(-(-weight.numel() // 2), torch.uint8)[:, None]
    return nf4_parameter(packed, quant_state=state, bnb_quantized=True)


def nf4_parameter(weight: torch.Tensor, **more: Any) -> Any:
    """A frozen parameter that packs its weight into 4 bits when it is moved to a device."""
    import bitsandbytes

    return bitsandbytes.nn.Params4bit(weight, requires_grad=False, **NF4_SETTINGS, **more)


def quantised_tensors(module: nn.Module) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """The tensors of quantised weights that are no parameters: (who holds it, under which name, the tensor)."""
    for weight in module.parameters(recurse=False):
        state = getattr(weight, "quant_state", None)
        for holder in (state, getattr(state, "state2", None)):
            names = ("absmax", "code", "offset") if holder is not None else ()
            yield from ((holder, name, value) for name in names if (value := getattr(holder, name)) is not None)
        for name in ("CB", "SCB"):
            if isinstance(getattr(weight, name, None), torch.Tensor):
                yield weight, name, getattr(weight, name)


def compute_as_on_a_card(model: nn.Module) -> None:
    """Let 8-bit layers that lie on a CPU multiply as bitsandbytes does on a card, whatever their mode."""
    import bitsandbytes

    class State(bitsandbytes.MatmulLtState):
        is_training = property(lambda self: False, lambda self, value: None)

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            state = State()
            state.has_fp16_weights, state.threshold = False, layer.state.threshold
            layer.state = state


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a layer's weights and of the constants of quantised ones."""
    found = [*module.parameters(), getattr(getattr(module, "state", None), "SCB", None)]
    for part in module.modules():  # CB is the weight itself
        found += [tensor for _, name, tensor in quantised_tensors(part) if name != "CB"]
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def unquantised(model: Any) -> tuple[int, dict[str, int]]:
    """Return how many weights lie in 4 or 8 bits, and how many matrices' weights do not, by the layer's last name.

    Embeddings and the head are left out: they stay as they are on purpose.
    """
    head, small, large = model.get_output_embeddings(), 0, Counter[str]()
    seen: set[int] = set()
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            if id(weight) in seen or module is head or isinstance(module, nn.Embedding):
                continue
            seen.add(id(weight))
            if type(weight).__name__ in ("Params4bit", "Int8Params"):
                small += n_elements(weight)
            elif weight.dim() > 1:
                large[path.rpartition(".")[2]] += weight.numel()
    return small, dict(large.most_common())


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class for adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit. Raises ConfigError."""
    if name == "adamw":
        return torch.optim.AdamW
    if name not in OPTIMIZERS:
        raise ConfigError("--optimizer", f"{name} is unknown; use adamw, {', '.join(OPTIMIZERS)}")
    import bitsandbytes

    return getattr(bitsandbytes.optim, OPTIMIZERS[name])


def page_out(tensor: torch.Tensor) -> None:
    """Let a tensor of a paged optimizer, which card and RAM share, lie in RAM until it is used; others stay."""
    if getattr(tensor, "is_paged", False):
        from bitsandbytes.functional import prefetch_tensor

        prefetch_tensor(tensor, to_cpu=True)


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
