"""The requests to torch's allocator while a model is loaded and made ready for training.

Each weight lies on the card in 16 bits before it is quantised there, so that loading leaves gaps in segments of a fixed
size. Knows an `Architecture` and a `estimate.MemoryConfig`; the order of layers is that of a checkpoint, about.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onecard.model.memory.architecture import Architecture, Linear
from onecard.model.memory.caching_allocator import Requests
from onecard.model.memory.tensor_sizes import (
    FP32,
    adapter_shapes,
    expert_bits,
    layer_bytes,
    state_sizes,
    streamed_layer_bytes,
    whole_shapes,
)
from onecard.model.memory_saving.streamed_layers import N_SLOTS
from onecard.model.quantization import NF4_BLOCK, NF4_SUPERBLOCK


def loading(model: Architecture, setup: Any) -> Requests:
    """The requests for the base in its bits."""
    requests = Requests()
    head = _beside_layers(requests, model, setup)
    if not setup.stream_layers:
        for number in range(model.n_layers):
            for linear in _of_layer(model.linears[::-1], model, number):  # down_proj first
                _load(requests, linear, setup.bits, setup)
            for expert in _of_layer(model.experts, model, number):
                requests.take(layer_bytes(expert, expert_bits(setup), setup))
    if setup.head_bits < 16:
        _quantise(requests, model.hidden_size, model.vocab_size, setup.head_bits, setup.element_bytes)
        requests.let_go(*head)
    return requests


def preparing(model: Architecture, setup: Any) -> tuple[Requests, list[list[int]]]:
    """All further requests until the first step, and bytes of the gradients of each layer, those of no layer last."""
    requests, trained = Requests(), _trained(model, setup)
    for _ in range(min(N_SLOTS, model.n_layers) if setup.stream_layers else 0):
        requests.take(streamed_layer_bytes(model, setup))
    _attach(requests, trained[:-1], on_card=not setup.stream_layers, element_bytes=setup.element_bytes)
    for n_bytes in trained[-1]:
        requests.take(n_bytes)
    for sizes in trained:
        for n_bytes in sizes:
            for state in state_sizes(n_bytes // FP32, setup.optimizer):
                requests.take(state)
    waits = setup.only_vocabulary
    return requests, [[] if waits and number < model.n_layers else sizes for number, sizes in enumerate(trained)]


def _attach(requests: Requests, adapters: list[list[int]], *, on_card: bool, element_bytes: int) -> None:
    """Adapters beside layers on the card come there in the base's type, through a copy in fp32; then peft makes all of
    them fp32. Others come in fp32."""
    every = [n_bytes for sizes in adapters for n_bytes in sizes]
    narrow = []
    if on_card and element_bytes < FP32:
        for n_bytes in every:
            narrow.append(requests.take(n_bytes * element_bytes // FP32))
            requests.let_go(requests.take(n_bytes))
    for number, n_bytes in enumerate(every):
        requests.take(n_bytes)
        requests.let_go(*narrow[number : number + 1])


def _beside_layers(requests: Requests, model: Architecture, setup: Any) -> list[int]:
    """Embeddings, norms and head in 16 bits; returns the request of a head that will be quantised."""
    if not setup.offload_embeddings or (model.tied and setup.head_bits == 16):
        requests.take(model.n_embedding * setup.element_bytes)
    n_norms = 2 * model.n_layers + 1
    for _ in range(n_norms):
        requests.take(model.n_other * setup.element_bytes / n_norms)
    head = [] if model.tied else [requests.take(model.hidden_size * model.vocab_size * setup.element_bytes)]
    return head if setup.head_bits < 16 else []


def _of_layer(linears: tuple[Linear, ...], model: Architecture, number: int) -> Iterator[Linear]:
    """The linear layers of a decoder layer, those that only some have in the first of them."""
    for linear in linears:
        per_layer = -(-linear.count // model.n_layers)
        for _ in range(min(per_layer, linear.count - number * per_layer)):
            yield linear


def _load(requests: Requests, linear: Linear, bits: int, setup: Any) -> None:
    _quantise(requests, linear.n_in, linear.n_out, bits, setup.element_bytes)
    if linear.bias:
        requests.take(linear.n_out * setup.element_bytes)


def _quantise(requests: Requests, n_in: int, n_out: int, bits: int, element_bytes: int) -> None:
    """One weight, as bitsandbytes quantises it on the card: `functional.quantize_4bit` and `Int8Params.to`."""
    n_weights = n_in * n_out
    whole = requests.take(n_weights * element_bytes)
    if bits == 4:
        n_blocks = -(-n_weights // NF4_BLOCK)
        scales = requests.take(n_blocks * FP32)
        requests.take(-(-n_weights // 2))
        for n_numbers in (16, 1):  # the values of 4 bits, and the mean of the scales
            requests.take(n_numbers * FP32)
        centred = requests.take(n_blocks * FP32)
        requests.take(-(-n_blocks // NF4_SUPERBLOCK) * FP32)
        requests.take(n_blocks)
        requests.take(256 * FP32)  # the values of 8 bits
        requests.let_go(centred, scales)
    elif bits == 8:
        again = requests.take(n_weights * element_bytes)  # it comes from the CPU a second time
        requests.take(n_out * FP32)
        requests.take(n_weights)
        requests.let_go(again)
    if bits < 16:
        requests.let_go(whole)


def _trained(model: Architecture, setup: Any) -> list[list[int]]:
    """Bytes of each tensor that is trained, in fp32, of each layer; those of no layer last."""
    found: list[list[int]] = []
    shapes = {linear: sizes for linear, sizes in adapter_shapes(model, setup) if linear.n_in}
    for number in range(model.n_layers):
        of_layer = _of_layer(tuple(shapes), model, number)
        found.append([FP32 * size for linear in of_layer for size in shapes[linear]])
    others = [size for linear, sizes in adapter_shapes(model, setup) if not linear.n_in for size in sizes]
    return [*found, [FP32 * size for size in (*others, *whole_shapes(model, setup))]]
