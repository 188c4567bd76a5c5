"""How large the tensors of a setup are that lie still while it trains: weights, adapters and the optimizer's state.

Knows an `Architecture` and a `estimate.MemoryConfig`; does not know where they lie, or what comes and goes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from onecard.config.lora import LoraOptions
from onecard.model.lora.targets import EXPERTS
from onecard.model.memory.architecture import Architecture, Linear
from onecard.model.quantization import NF4_BLOCK, NF4_SUPERBLOCK

FP32 = 4  # bytes
# NF4 with double quantisation (arXiv:2305.14314): an 8-bit scale for each 64 weights, an fp32 one for each 256 scales,
# one offset, and two tables of 16 and 256 numbers for each layer.
NF4_TABLE_BYTES = FP32 * (1 + 16 + 256)
# 8-bit Adam (arXiv:2110.02861): two bytes per weight and an fp32 scale for each 256; small tensors keep fp32 state.
ADAM8_BLOCK, ADAM8_SMALLEST = 256, 4096
WHOLE_MODEL = Linear("whole model", 0, 0, bias=False, count=1)  # in the place of a layer: virtual tokens, bottlenecks


def linear_bytes(n_in: int, n_out: int, bits: int, element_bytes: int) -> int:
    """One linear layer's weight (n_out, n_in) in `bits`, with the constants that quantisation needs."""
    n_weights = n_in * n_out
    if bits == 4:
        blocks = -(-n_weights // NF4_BLOCK)
        return -(-n_weights // 2) + blocks + -(-blocks // NF4_SUPERBLOCK) * FP32 + NF4_TABLE_BYTES
    if bits == 8:
        return n_weights + n_out * FP32
    return n_weights * element_bytes


def expert_bits(setup: Any) -> int:
    """Bits of experts that lie in one tensor: LLM.int8 has no form for these."""
    return 4 if setup.bits == 4 else 8 * setup.element_bytes


def adapter_shapes(model: Architecture, setup: Any) -> list[tuple[Linear, tuple[int, ...]]]:
    """The linear layers that get an adapter, and how many weights each tensor of one such adapter has."""
    options = LoraOptions(setup.peft_method)
    if options.tunes_base:
        return []
    if options.sized_by_model:
        return [(WHOLE_MODEL, _whole_model_shapes(model, setup.peft_method, setup.peft_option))]
    wanted = [name.strip().rsplit(".", 1)[-1] for name in setup.targets.split(",")]
    everywhere = setup.targets.strip() == "all-linear"
    experts = [name.strip() for name in setup.expert_targets.split(",") if name.strip()]
    chosen = [linear for linear in model.linears if linear.adapted and (everywhere or linear.name in wanted)]
    chosen += [each for each in model.experts if any(name == EXPERTS or each.name.endswith(name) for name in experts)]
    if setup.peft_method != "lora":
        return list(zip(chosen, method_tensors_of(setup, chosen)[0], strict=True))
    found = []
    for linear in chosen:
        magnitude = (linear.n_out,) if setup.use_dora else ()
        found.append((linear, (setup.rank * linear.n_in, setup.rank * linear.n_out, *magnitude)))
    return found


def method_tensors_of(setup: Any, chosen: list[Linear]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Weights in each tensor of another method than LoRA, by layer, and bytes of what it keeps beside them."""
    return _method_tensors(setup.peft_method, setup.peft_option, setup.rank, tuple(chosen))


@lru_cache(maxsize=64)
def _method_tensors(
    method: Any, option: str, rank: int, chosen: tuple[Linear, ...]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    from onecard.model.lora.method_size import method_tensors  # only here: peft takes seconds

    options = LoraOptions(peft_method=method, peft_option=option, lora_r=rank)
    shapes, kept, shared = method_tensors(options, [(linear.name, linear.n_in, linear.n_out) for linear in chosen])
    beside = sum(linear.count * n_bytes for linear, n_bytes in zip(chosen, kept, strict=True))
    return tuple(tuple(sizes) for sizes in shapes), beside + shared


@lru_cache(maxsize=64)
def _whole_model_shapes(model: Architecture, method: str, option: str) -> tuple[int, ...]:
    """How many weights each tensor has of a method whose size follows from the whole model."""
    from onecard.model.lora.method_size import whole_model_tensors  # only here: peft takes seconds

    config, own_code = model.source.read()
    return whole_model_tensors(LoraOptions(method, option), config, **own_code)


@lru_cache(maxsize=64)
def tuned_shapes(model: Architecture, method: str) -> tuple[int, ...]:
    """How many weights of the base each tensor has that is trained itself; none where there is an adapter."""
    if not LoraOptions(method).tunes_base:
        return ()
    from onecard.model.full_tuning import trained_sizes  # only here: it takes seconds

    config, own_code = model.source.read()
    return trained_sizes(config, LoraOptions(method), **own_code)


def vocabulary_shapes(model: Architecture, setup: Any) -> list[int]:
    """How many weights of embeddings and head are trained, in each tensor; tied, they are one."""
    n_rows = model.vocab_size if setup.train_embeddings else setup.n_new_tokens
    return [n_rows * model.hidden_size] * (1 if model.tied else 2) if n_rows else []


def whole_shapes(model: Architecture, setup: Any) -> list[int]:
    """How many weights each tensor has that is trained and is of no adapter's layer."""
    scalar_head = [model.hidden_size] * setup.gives_reward
    return [*vocabulary_shapes(model, setup), *tuned_shapes(model, setup.peft_method), *scalar_head]


def n_trained(model: Architecture, setup: Any) -> int:
    """Weights of the adapter, unless it waits, and those beside it that are trained."""
    of_base = sum(whole_shapes(model, setup))
    return (not setup.only_vocabulary) * n_adapter(model, setup) + of_base


def n_adapter(model: Architecture, setup: Any) -> int:
    """Weights of the adapter, whether it is trained or waits."""
    return sum(linear.count * sum(sizes) for linear, sizes in adapter_shapes(model, setup))


def optimizer_bytes(model: Architecture, setup: Any) -> int:
    """The state of the optimizer: two numbers per trained weight."""
    adapter = [] if setup.only_vocabulary else adapter_shapes(model, setup)
    every = [(size, linear.count) for linear, sizes in adapter for size in sizes]
    every += [(size, 1) for size in whole_shapes(model, setup)]
    return sum(count * sum(state_sizes(size, setup.optimizer)) for size, count in every)


def state_sizes(n_weights: int, optimizer: str) -> list[int]:
    """Bytes of each tensor of the optimizer's state for a tensor of so many weights."""
    if "8bit" not in optimizer or n_weights < ADAM8_SMALLEST:
        return 2 * [n_weights * FP32]
    return 2 * [n_weights, -(-n_weights // ADAM8_BLOCK) * FP32]


def layer_bytes(linear: Linear, bits: int, setup: Any) -> int:
    """One linear layer or one tensor of experts, bias included."""
    weights = linear_bytes(linear.n_in, linear.n_out, bits, setup.element_bytes)
    return weights + linear.bias * linear.n_out * setup.element_bytes


def streamed_layer_bytes(model: Architecture, setup: Any) -> int:
    """The weights of one decoder layer; where layers differ, of one that has everything."""
    kinds = [(linear, setup.bits) for linear in model.linears] + [(each, expert_bits(setup)) for each in model.experts]
    return sum(-(-linear.count // model.n_layers) * layer_bytes(linear, bits, setup) for linear, bits in kinds)
