"""The model of a config.json on fake tensors: adapters attached, one decoder layer of each kind.

Built by transformers on torch's meta device, quantised there in sizes alone, with this project's own adapters; then its
tensors are made to claim that they lie on the CPU, since autocast and autograd ask for the device. Knows modules and a
`estimate.MemoryConfig`; what runs over them is `simulate.py`'s. https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM

from onecard.model.model_layers import text_part

CPU = torch.device("cpu")
FEW_TILES = 3  # of a quantised head: those between the second and the last take what the second does


@dataclass
class FakeModel:
    """A model without bytes, adapters attached; of its decoder layers one of each kind and the first.

    layers: those that were kept. numbers: which of the whole model's they are. kinds: of each layer of the whole model
    the position in `layers` of the one that stands for it.
    """

    peft: Any
    mode: FakeTensorMode
    layers: list[nn.Module]
    numbers: list[int]
    kinds: list[int]


def build(config: Any, setup: Any, *, whole: bool = False, unpacked: bool = True, **own_code: Any) -> FakeModel:
    """The model of a transformers config under `setup` (a `estimate.MemoryConfig`). whole: with all of its layers.

    unpacked: without masks that only several texts in a row need; see `packed_attention.plan_attention`.
    """
    from onecard.config.lora import FREEZE, LoraOptions
    from onecard.model.attention import avoid_flash
    from onecard.model.load import checkpoint_layers
    from onecard.model.memory_saving.lm_head import quantize_head
    from onecard.model.memory_saving.tiled_head import dequantise_in_tiles
    from onecard.model.output_head import assume_way
    from onecard.model.packed_attention import plan_attention
    from onecard.model.quantization import compute_as_on_a_card, quantize_on_meta
    from onecard.model.trained import make_trainable

    dtype = torch.float32 if setup.element_bytes == 4 else torch.float16 if setup.repeats_kv else torch.bfloat16
    kernel = {"attn_implementation": "eager"} if setup.eager_attention else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **kernel, **own_code)
    base.requires_grad_(False)
    layers, numbers, kinds = ([], [], []) if whole else cut_layers(base, with_last=setup.on_gpu)
    quantize_on_meta(base, setup.bits, dtype)
    if setup.head_bits < 16:
        quantize_head(base, setup.head_bits, dtype)
        dequantise_in_tiles(base.get_output_embeddings(), at_most=FEW_TILES)
    if setup.repeats_kv:
        avoid_flash(base)
    if unpacked:
        plan_attention(base, packed=setup.packs_texts)
    lora = LoraOptions(
        peft_method=setup.peft_method, peft_option=setup.peft_option,
        lora_r=setup.rank, use_dora=setup.use_dora, lora_dropout=setup.lora_dropout,
        lora_target_modules=setup.targets, lora_target_parameters=setup.expert_targets,
        train_embeddings=setup.train_embeddings, train_new_tokens=setup.n_new_tokens > 0,
    )  # fmt: skip
    if lora.n_last_layers and not whole:  # each kind of layer as one that is trained; `ActivationPeak` counts how many
        lora = replace(lora, peft_method=f"{FREEZE}{len(layers)}")
    n_rows = base.get_input_embeddings().weight.shape[0]
    with torch.device("meta"):
        new_ids = list(range(n_rows - setup.n_new_tokens, n_rows))
        peft = make_trainable(base, lora, new_ids=new_ids, gives_reward=setup.gives_reward)
    if setup.gradient_checkpointing:
        checkpoint_layers(base, reentrant=setup.bits == 8)
    if setup.on_gpu and setup.bits == 8:
        compute_as_on_a_card(peft)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # `shape_cache.py` has one that is faster
    to_fake(peft, mode)
    assume_way(peft)
    return FakeModel(peft.train(), mode, layers, numbers, kinds)


def cut_layers(base: Any, *, with_last: bool = False) -> tuple[list[nn.Module], list[int], list[int]]:
    """Leave of the decoder layers the first and one of each kind; see `FakeModel`.

    with_last: the last one, too, so that the others have neighbours on both sides.
    """
    config = base.config.get_text_config()
    n_layers = config.num_hidden_layers
    lists = [path for path, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    path = next(
        path for path in lists if path.startswith(text_part(base)) and len(base.get_submodule(path)) == n_layers
    )
    every = list(base.get_submodule(path))
    signs = [_layer_kind(layer, config, number) for number, layer in enumerate(every)]
    if with_last:
        signs[-1] += " last"
    numbers = [0, *sorted({sign: number for number, sign in reversed([*enumerate(signs)][1:])}.values())]
    of_sign = {signs[number]: position for position, number in enumerate(numbers) if number}
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    layers = [every[number] for number in numbers]
    base.set_submodule(path, nn.ModuleList(layers))
    return layers, numbers, [0, *(of_sign[sign] for sign in signs[1:])]


def _layer_kind(layer: nn.Module, config: Any, number: int) -> str:
    """What tells kinds of layers apart: modules, sizes, plain settings but its own number, entries of the config."""
    settings = [
        (name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, str, float)) and not any(word in name for word in ("idx", "index", "layer_id"))
    ]
    n_layers = config.num_hidden_layers
    listed = [v[number] for v in vars(config).values() if isinstance(v, list) and len(v) == n_layers]
    return json.dumps([repr(layer), settings, listed], default=str)


@cache
def _fake_class(name: str) -> type[FakeTensor]:
    return type(name, (FakeTensor,), {})


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn parameters, buffers and scales of a model on the meta device into tensors that claim to lie on the CPU.

    https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
    """
    from onecard.model.lora.sparse import sparse_places
    from onecard.model.quantization import quantised_tensors

    made: dict[int, tuple[Tensor, Tensor]] = {}
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = (tensor, FakeTensor(mode, tensor.detach().to("meta"), CPU))
        return made[id(tensor)][1]

    def fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in parameters:
            same: Any = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
            if vars(parameter):  # quantised: with its notes, and by the name of its class, which peft asks for
                vars(same).update(vars(parameter))
                same.__class__ = _fake_class(type(parameter).__name__)
            if same.requires_grad:
                same.grad = fake(parameter.detach().clone())  # there from an earlier micro-batch
            parameters[id(parameter)] = (parameter, same)
        return parameters[id(parameter)][1]

    for module in model.modules():
        for holder, name, tensor in [*quantised_tensors(module)]:
            setattr(holder, name, tensor if isinstance(tensor, FakeTensor) else fake(tensor))
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter if parameter is None else fake_parameter(parameter)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else fake(buffer)
        places = sparse_places(module)
        places.update({name: fake(tensor) for name, tensor in places.items()})
