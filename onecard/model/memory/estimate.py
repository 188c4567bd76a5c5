"""The arithmetic of memory: what a run holds on the card, part by part, from numbers alone.

`account` adds up what lies there from the first step to the last (weights, adapter, gradients, optimizer) and the worst
moment of a step, which `activation_peak.py` finds by running the real model on fake tensors: the loss, or one layer
that is computed again for its gradients. Every number is bytes of tensors. What is not a tensor, the CUDA context and
the allocator's slack, is a part of its own; no card has confirmed its size yet.

It knows an `Architecture` and a `MemoryConfig`; it does not know cards, options or which setup is best: `plan.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from onecard.config.lora import LoraOptions
from onecard.model.memory.activation_peak import find_peak
from onecard.model.memory.architecture import Architecture, Linear
from onecard.model.memory.reserved_memory import reserved_beyond_tensors
from onecard.model.memory.simulate import LOSS
from onecard.model.memory.tensor_sizes import (
    FP32,
    adapter_shapes,
    expert_bits,
    layer_bytes,
    linear_bytes,
    method_tensors_of,
    n_adapter,
    n_trained,
    optimizer_bytes,
    streamed_layer_bytes,
    tuned_shapes,
    vocabulary_shapes,
    whole_shapes,
)
from onecard.model.memory_saving.activation_offload import CHUNK_BYTES
from onecard.model.memory_saving.streamed_layers import N_SLOTS

GIB = 2**30
RNG_BYTES = 5056  # each checkpoint keeps the state of the CPU's generator; it lies in RAM

# Assumed, not measured: what a process holds before its first tensor (context, kernels, cuBLAS workspaces).
CUDA_CONTEXT_BYTES = GIB // 2
# Of Python, torch, transformers and peft in RAM: what runs of a 135M model on a CPU held beside their tensors.
LIBRARY_BYTES = int(0.55 * GIB)
# What torch's caching allocator needs beyond the tensors: a share of what comes and goes, and some bytes. Source: the
# smallest limits under which a step ran with the arithmetic of that allocator (benchmarks/reserved_memory.py), with
# segments that grow and without; no card has confirmed them yet. Where a step's requests are known,
# `reserved_memory.py` replays them instead.
GROWING_SLACK, FIXED_SLACK = (0.08, 40 * 2**20), (0.3, 50 * 2**20)
# With so much to spare a step fits without a replay, where nothing else is asked: of what comes and goes (with segments
# that grow, and without) and some bytes. Twice what was seen: the 62 steps of that benchmark need at most 0.20 and 0.60
# of it for one micro-batch; for the two that are planned six models were looked at, 0.20 and 0.58 at most.
AMPLE_SHARES, AMPLE_BYTES = (0.4, 1.0), 256 * 2**20


@dataclass(frozen=True)
class MemoryConfig:
    """How a run uses the card: all that decides its memory besides the model."""

    bits: int
    element_bytes: int
    """Of the arithmetic and of everything unquantised: 2 (fp16, bf16) or 4 (fp32)."""
    rows: int
    """Of the largest micro-batch."""
    length: int
    """Its tokens per row, padding included."""
    rank: int = 8
    targets: str = "all-linear"
    """As --lora_target_modules."""
    expert_targets: str = ""
    """As --lora_target_parameters."""
    use_dora: bool = False
    peft_method: str = "lora"
    peft_option: str = ""
    train_embeddings: bool = False
    """Copies of embeddings and head are trained in full, in fp32, beside the frozen ones."""
    n_new_tokens: int = 0
    """Rows of embeddings and head that are trained, in fp32."""
    gives_reward: bool = False
    """A scalar head gives each text a number, in the place of logits."""
    only_vocabulary: bool = False
    """The adapter beside them is there, and not trained."""
    lora_dropout: float = 0.0
    """Above 0, its masks are kept for the backward pass."""
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    loss_chunk: int = 1024
    """Supervised tokens whose logits exist at once; 0: all."""
    offload_activations: bool = False
    offload_embeddings: bool = False
    head_bits: int = 16
    """4 or 8: the output head is quantised, too."""
    mlp_tile: int = 0
    """Tokens that pass through an MLP at once; 0: all."""
    stream_layers: bool = False
    """The frozen layers lie in RAM and pass through a few slots on the card."""
    eager_attention: bool = False
    """Scores of all pairs of tokens exist at once."""
    packs_texts: bool = False
    """Rows hold several texts, each of which sees itself alone."""
    masks_parts: bool = False
    """Rows hold two answers, which a mask keeps apart."""
    repeats_kv: bool = False
    """Keys and values are copied for every query head, as the kernel of older cards needs them."""
    on_gpu: bool = True
    expandable_segments: bool = True
    """Segments of torch's allocator grow, so that what is freed is room for anything."""
    n_shards: int = 1
    """Cards that each frozen layer is divided over; two at a time are put together."""
    n_cards: int = 1
    """Cards that the layers are spread over; the account is for the fullest one."""

    @property
    def trains_vocabulary(self) -> bool:
        """Whether embeddings and head get gradients, in full or in rows."""
        return self.train_embeddings or self.n_new_tokens > 0

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class MemoryComponent:
    """Some bytes and what they are. `place` is card or RAM; what comes and goes within a step is `transient`."""

    name: str
    n_bytes: int
    place: str = "card"
    transient: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """All parts of one setup."""

    parts: tuple[MemoryComponent, ...]

    @property
    def card_bytes(self) -> int:
        """The peak on the card: tensors, context and slack; without a card in RAM: tensors and libraries."""
        return sum(part.n_bytes for part in self.parts if part.place == "card")

    @property
    def tensor_bytes(self) -> int:
        """The peak of tensors on the card alone: what `torch.cuda.max_memory_allocated` would say."""
        return sum(p.n_bytes for p in self.parts if p.place == "card" and p.name not in (CONTEXT, SLACK, LIBRARIES))

    @property
    def ram_bytes(self) -> int:
        """What lies in the machine's RAM instead of on the card."""
        return sum(part.n_bytes for part in self.parts if part.place == "RAM")


CONTEXT, SLACK = "CUDA context (assumed)", "allocator slack (not measured)"
LIBRARIES = "Python and its libraries"
INPUTS = "inputs of all layers"


def account(model: Architecture, setup: MemoryConfig, within: int = 0, *, only_fits: bool = False) -> MemoryEstimate:
    """Everything that `setup` holds while it trains `model`, in bytes, at the worst moment.

    within: bytes of the card, where they are known. What does not fit without the allocator's slack is then given a
    rough one, which takes no time. only_fits: whether it fits within them is all that has to be right.
    """
    setup = _possible(model, setup)
    parts = [*_weights(model, setup), *_training(model, setup), *_activations(model, setup), _mask(model, setup)]
    if setup.n_cards > 1:
        parts = [_on_fullest(part, model, setup) for part in parts]
    if setup.on_gpu:
        moving = sum(part.n_bytes for part in parts if part.transient and part.place == "card")
        tensors = CUDA_CONTEXT_BYTES + sum(part.n_bytes for part in parts if part.place == "card")
        ask = partial(_slack, model, setup, moving, within - tensors, only_fits=only_fits)
        slack = _rough_slack(setup, moving) if 0 < within < tensors else ask()
        parts += [MemoryComponent(CONTEXT, CUDA_CONTEXT_BYTES), MemoryComponent(SLACK, slack)]
    else:
        parts.append(MemoryComponent(LIBRARIES, LIBRARY_BYTES))
    return MemoryEstimate(tuple(part for part in parts if part.n_bytes))


def _slack(model: Architecture, setup: MemoryConfig, moving: int, spare: int, *, only_fits: bool) -> int:
    """What the allocator needs beyond the tensors, of which `moving` bytes come and go; spare: what the card has."""
    ask = partial(reserved_beyond_tensors, model, setup, moving)
    if only_fits and spare >= AMPLE_BYTES + AMPLE_SHARES[not setup.expandable_segments] * moving:
        return spare
    found = ask(spare) if only_fits else ask()
    if found is None:
        return _rough_slack(setup, moving)
    # The search for the smallest limit ends a little above it: what the card has may do nevertheless.
    return spare if 0 <= spare < found and ask(spare) == spare else found


def _rough_slack(setup: MemoryConfig, moving: int) -> int:
    share, least = GROWING_SLACK if setup.expandable_segments else FIXED_SLACK
    return least + int(moving * share)


def _mask(model: Architecture, setup: MemoryConfig) -> MemoryComponent:
    """The mask of rows of two answers: bool, and as numbers for each layer that is not computed again."""
    cells = setup.rows * setup.length**2 * setup.masks_parts * (not setup.eager_attention)  # eager has one anyway
    n_layers = 1 if setup.gradient_checkpointing else model.n_layers
    return MemoryComponent("mask of shared rows", cells * (1 + setup.element_bytes * n_layers), transient=True)


def _on_fullest(part: MemoryComponent, model: Architecture, setup: MemoryConfig) -> MemoryComponent:
    """What of a part lies on the fullest of several cards, which accelerate gives as much and 1.25 layers more.

    Source: `accelerate.utils.get_balanced_memory`. What comes and goes is counted in full: any card may do the worst.
    """
    if part.place != "card" or (part.transient and part.name != INPUTS):
        return part
    return replace(part, n_bytes=min(part.n_bytes, int(part.n_bytes * (1 / setup.n_cards + 1.25 / model.n_layers))))


def held_bytes(model: Architecture, setup: MemoryConfig) -> int:
    """What lies on the card from the first step to the last: the least that `setup` needs."""
    setup = _possible(model, setup)
    parts = [*_weights(model, setup), *_training(model, setup)]
    if setup.n_cards > 1:
        parts = [_on_fullest(part, model, setup) for part in parts]
    context = CUDA_CONTEXT_BYTES if setup.on_gpu else LIBRARY_BYTES
    return context + sum(part.n_bytes for part in parts if part.place == "card")


def _possible(model: Architecture, setup: MemoryConfig) -> MemoryConfig:
    """The setup without what this model's layers cannot do, whatever was asked for."""
    return replace(
        setup,
        gradient_checkpointing=setup.gradient_checkpointing and model.checkpoints,
        mlp_tile=setup.mlp_tile if model.tiles else 0,
        head_bits=setup.head_bits if model.small_head else 16,
        stream_layers=setup.stream_layers and model.checkpoints,
    )


def _weights(model: Architecture, setup: MemoryConfig) -> list[MemoryComponent]:
    mlp_kinds = _mlp_linears(model)
    attention, mlp, experts = (
        sum(linear.count * layer_bytes(linear, bits, setup) for linear in linears)
        for linears, bits in (
            ([linear for linear in model.linears if linear not in mlp_kinds], setup.bits),
            (mlp_kinds, setup.bits),
            (model.experts, expert_bits(setup)),
        )
    )
    head = model.hidden_size * model.vocab_size if setup.head_bits < 16 or not model.tied else 0
    head_bits = setup.head_bits if setup.head_bits < 16 else 16
    embeddings = model.n_embedding * setup.element_bytes
    # A head tied to the embeddings keeps them on the card, unless it has a quantised copy of its own.
    in_ram = setup.offload_embeddings and (not model.tied or setup.head_bits < 16)
    bits = f"{setup.bits} bits"
    place, n_slots = ("RAM", min(N_SLOTS, model.n_layers)) if setup.stream_layers else ("card", 0)
    if setup.n_shards > 1:
        attention, mlp, experts = (-(-n_bytes // setup.n_shards) for n_bytes in (attention, mlp, experts))
        n_slots = min(N_SLOTS, model.n_layers)
    return [
        MemoryComponent(f"base: attention, {bits}", attention, place),
        MemoryComponent(f"base: MLP, {bits}", mlp, place),
        MemoryComponent(f"base: experts, {expert_bits(setup)} bits", experts, place),
        MemoryComponent(f"base: {n_slots} layers on their way", n_slots * streamed_layer_bytes(model, setup)),
        MemoryComponent(_embedding_name(model, setup), embeddings, "RAM" if in_ram else "card"),
        MemoryComponent(f"output head{f', {head_bits} bits' if head_bits < 16 else ''}", head and linear_bytes(
            model.hidden_size, model.vocab_size, head_bits, setup.element_bytes)),
        MemoryComponent("norms and the rest", model.n_other * setup.element_bytes),
    ]  # fmt: skip


def _embedding_name(model: Architecture, setup: MemoryConfig) -> str:
    return "embeddings and head, tied" if model.tied and setup.head_bits >= 16 else "embeddings"


def _training(model: Architecture, setup: MemoryConfig) -> list[MemoryComponent]:
    whole, tuned = sum(vocabulary_shapes(model, setup)), sum(tuned_shapes(model, setup.peft_method))
    # Beside rows that are trained, peft keeps what they were.
    kept = FP32 if setup.train_embeddings else 2 * FP32
    name = "embeddings and head" if setup.train_embeddings else "rows of new tokens"
    kind = f"rank {setup.rank}" if setup.peft_method == "lora" else setup.peft_method
    beside = 0
    if setup.peft_method != "lora" and not tuned and not LoraOptions(setup.peft_method).sized_by_model:
        beside = method_tensors_of(setup, [linear for linear, _ in adapter_shapes(model, setup)])[1]
    return [
        MemoryComponent(f"adapter, {kind}, fp32", n_adapter(model, setup) * FP32),
        MemoryComponent("base: what is trained, fp32 in place of 16 bits", tuned * (FP32 - setup.element_bytes)),
        MemoryComponent("adapter, what is not trained", beside),
        MemoryComponent(f"{name}, trained, fp32", whole * kept),
        # peft keeps the head that it copies.
        MemoryComponent("scalar head, fp32", setup.gives_reward * 2 * model.hidden_size * FP32),
        MemoryComponent("gradients, fp32" if whole or tuned else "its gradients, fp32", n_trained(model, setup) * FP32),
        MemoryComponent(f"optimizer state, {setup.optimizer}", optimizer_bytes(model, setup)),
    ]


def _activations(model: Architecture, setup: MemoryConfig) -> list[MemoryComponent]:
    """What one micro-batch needs beside the weights, at its worst moment: the real model runs on fake tensors."""
    found = find_peak(model, setup)
    name = "the loss and its gradient" if found.phase == LOSS else "one layer, computed again"
    batch, inputs, rest = found.batch, found.inputs, found.rest - found.batch
    if not setup.on_gpu and setup.gradient_checkpointing:
        n_tiles = -(-setup.tokens // setup.mlp_tile) if setup.mlp_tile else 0
        batch += RNG_BYTES * (1 + model.n_layers + n_tiles)
    if not setup.gradient_checkpointing:
        inputs, rest, name = 0, inputs + rest, "all layers at their worst moment"
    return [
        MemoryComponent("batch and positions", batch, transient=True),
        MemoryComponent(INPUTS, inputs, transient=True),
        MemoryComponent(INPUTS, sum(-(-size // CHUNK_BYTES) * CHUNK_BYTES for size in found.sent), "RAM"),
        MemoryComponent(name, max(rest, _stepping(model, setup) - batch - inputs), transient=True),
    ]


def _stepping(model: Architecture, setup: MemoryConfig) -> int:
    """What the optimizer's step takes beside its state on a CPU, where a step works on one weight after the other.

    torch's AdamW makes two copies of a weight, while it still holds one of the weight before. That of bitsandbytes
    in 8 bits has both moments, the gradient, a root and a quotient in fp32 (`backends/cpu/ops.py`, 0.50).
    """
    if setup.on_gpu:
        return 0
    adapter = [] if setup.only_vocabulary else adapter_shapes(model, setup)
    every = [size for linear, sizes in adapter for size in sizes * min(2, linear.count)]
    largest = sorted([*every, *whole_shapes(model, setup), 0, 0], reverse=True)
    if "8bit" in setup.optimizer:
        return FP32 * 5 * largest[0]
    return FP32 * (2 * largest[0] + largest[1])


ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "o_proj", "dense", "out_proj")


def _mlp_linears(model: Architecture) -> list[Linear]:
    """The linear layers into and out of the feed-forward blocks; not those of vision and sound."""
    wide = (model.intermediate_size, 2 * model.intermediate_size)
    linears = [linear for linear in model.linears if linear.adapted and linear.name not in ATTENTION]
    return [linear for linear in linears if linear.n_in == wide[0] or linear.n_out in wide]
