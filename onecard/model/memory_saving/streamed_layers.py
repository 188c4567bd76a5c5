"""Frozen decoder layers lie in RAM and pass through a few slots on the device, one layer ahead of the arithmetic.

Knows tensors, streams and modules, and the constants of quantised weights. It does not know losses, steps, or whether
streaming is worth it: the plan (`model/memory/estimate.py`) decides that. Nothing here changes a value: losses,
gradients and answers are bitwise those of layers that stay on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import ConfigError, ModelError
from onecard.model.hardware import empty_cache
from onecard.model.memory_saving.activation_offload import Pool, SideStream, is_dense
from onecard.model.model_layers import decoder_layers, expert_tensors, inside_adapters
from onecard.model.quantization import quantised_tensors

FLAG = "--stream_layers"
N_SLOTS = 2  # one computes while the other is filled
ALIGNMENT = 256  # bytes; kernels read whole lines of memory
CHUNK_BYTES = 64 << 20  # torch pins powers of two: chunks of one waste nothing, whatever a layer takes


class StreamedLayers:
    """The decoder layers of one model in RAM, and the slots on the device through which they pass.

    Layer n always computes in slot n % N_SLOTS, so its weights are views of that slot for good and nothing is set
    anew when it is filled. While layer n computes, its neighbour is copied by a side stream: the next one on the way
    forward, the one before on the way back, where checkpointed layers are computed again. The last layers are still
    there when the way back begins, and so are the first when the next pass begins.

    Of a mixture of experts that chooses fewer than it has for a micro-batch, as for the next token of an answer, only
    the chosen ones are copied, once the layer's router has named them. Where it chooses more, nearly all are used, and
    they come with their layer, ahead.

    What is trained, buffers, modules shared by several layers and adapters stay on the device. A layer's gradients
    need its weights until the layer before begins, so training needs recomputed layers: a graph that is recorded
    without raises RuntimeError. `slot_bytes`: of one slot; `ram_bytes`: of all layers; `n_copies`: copies of layers so
    far; `copied_bytes`: all that was copied so far.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.device = device
        self._side = SideStream(device)
        tensors = _streamed_tensors(layers)
        self.slot_bytes = max(sum(_padded(slot.tensor.nbytes) for slot in own) for own in tensors)
        self._slots = _allocate(min(N_SLOTS, len(layers)), self.slot_bytes, device)
        for slot in self._slots:  # a copy may be on its way when the model is dropped
            self._side.may_write(slot)
        self._held: list[int | None] = [None] * len(self._slots)
        self._copied: list[Any] = [None] * len(self._slots)
        self._experts: dict[int, _Experts] = {}  # by layer
        self._missing: list[set[int]] = [set() for _ in self._slots]  # experts of the layer that is there
        self._few_chosen = False  # as the last router did: then copies leave experts out
        self._ram = _Ram(chunk_bytes, pinned=device.type == "cuda")
        self._layers = [self._pack(n, own) for n, own in enumerate(tensors)]
        self._last, self.n_copies, self.copied_bytes = 0, 0, 0
        for index, layer in enumerate(layers):
            _streamers[layer] = (self, index)
            layer.register_forward_pre_hook(_refuse_graph)
            # Inside a checkpoint the layer itself is not called again, only what is in it.
            for module in layer.modules():
                module.register_forward_pre_hook(partial(_bring, self, index))
            if index in self._experts:
                chooses = self._experts[index].module
                chooses.register_forward_pre_hook(partial(_bring_chosen, self, index), with_kwargs=True)

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that the layers take."""
        return self._ram.n_bytes

    @property
    def summary(self) -> str:
        """What lies where, for a person."""
        slots = f"{len(self._slots)} x {self.slot_bytes / 2**20:,.0f} MiB on {self.device.type}"
        return f"{len(self._layers)} layers lie in RAM ({self.ram_bytes / 2**30:.2f} GiB) and pass through {slots}"

    def bring(self, index: int, *, goes_on: bool = False) -> None:
        """Let the stream that computes find the weights of layer `index`, and start the copy of its neighbour.

        goes_on: after the last layer comes the first again, as in answers, and not the way back.
        """
        slot = index % len(self._slots)
        if self._held[slot] == index == self._last:
            return
        if self._held[slot] != index:
            self._copy(index)
        self._side.let_compute_wait(self._copied[slot])
        neighbour = index + 1 if index >= self._last else index - 1
        if neighbour == len(self._layers) and goes_on:
            neighbour = 0
        self._last = index
        if 0 <= neighbour < len(self._layers):
            beside = neighbour % len(self._slots)
            if beside != slot and self._held[beside] != neighbour:
                self._copy(neighbour)

    def bring_experts(self, index: int, chosen: Tensor | None = None) -> None:
        """Let the stream that computes find the experts of layer `index`, which was brought, that are chosen.

        chosen: their numbers, any shape; None: all of them.
        """
        experts, slot = self._experts.get(index), index % len(self._slots)
        if experts is None:
            return
        self._few_chosen = chosen is not None and chosen.numel() < experts.n
        missing = self._missing[slot]
        if missing and self._few_chosen:
            missing = missing.intersection(chosen.unique().tolist())  # type: ignore[union-attr]
        if not missing:
            return
        with torch.no_grad(), self._side.after_compute():
            for start, n_bytes in experts.tensors:
                for number in sorted(missing):
                    self._send(index, start + number * n_bytes, start + (number + 1) * n_bytes)
        self._side.let_compute_wait(self._side.mark())
        self._missing[slot] = self._missing[slot] - missing

    def _copy(self, index: int) -> None:
        """Queue the copy of a layer into its slot, behind all that still computes there."""
        number, waiting = index % len(self._slots), self._experts.get(index) if self._few_chosen else None
        self._held[number] = None
        with torch.no_grad(), self._side.after_compute():
            self._send(index, 0, waiting.start if waiting else self.slot_bytes)
        self._copied[number] = self._side.mark()
        self._missing[number] = set(range(waiting.n)) if waiting else set()
        self._held[number] = index
        self.n_copies += 1

    def _send(self, index: int, begin: int, end: int) -> None:
        """Copy these bytes of a layer to their place in its slot."""
        slot, start = self._slots[index % len(self._slots)], 0
        for piece in self._layers[index]:
            first, last = max(begin, start), min(end, start + len(piece))
            if first < last:
                slot[first:last].copy_(piece[first - start : last - start], non_blocking=True)
                self.copied_bytes += last - first
            start += len(piece)

    def _pack(self, index: int, tensors: list[_Streamed]) -> list[Tensor]:
        """Move the tensors of one layer into RAM, one behind the other, and let its modules see the slot instead."""
        pieces = self._ram.take(sum(_padded(each.tensor.nbytes) for each in tensors))
        slot, start = self._slots[index % len(self._slots)], 0
        for each in sorted(tensors, key=lambda each: each.experts is not None):  # they come last
            here = each.tensor.detach()
            _write(here.as_strided((here.numel(),), (1,)).view(torch.uint8), pieces, start)
            each.show(slot[start : start + here.nbytes].view(here.dtype).as_strided(here.shape, here.stride()))
            if each.experts is not None:
                experts = self._experts.setdefault(index, _Experts(each.experts, start))
                experts.tensors.append((start, here.nbytes // experts.n))
            start += _padded(here.nbytes)
        return pieces


class _Streamed:
    """One tensor of a layer, and all places that hold it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.parameters: list[nn.Parameter] = []
        self.experts: nn.Module | None = None  # whose weights it holds, one behind the other
        self.holders: list[tuple[Any, str]] = []

    def show(self, view: Tensor) -> None:
        for parameter in self.parameters:
            parameter.data = view
        for holder, name in self.holders:
            setattr(holder, name, view)
        self.tensor = view


class _Experts:
    """The experts of a layer in its stretch of bytes: the module that is given the chosen ones, and where they begin.

    `tensors`: of each of their tensors, where it begins, and bytes of one expert in it.
    """

    def __init__(self, module: nn.Module, start: int) -> None:
        self.module, self.start = module, start
        self.n: int = module.num_experts  # type: ignore[assignment]
        self.tensors: list[tuple[int, int]] = []


class _Ram:
    """RAM in chunks of one size, filled one behind the other; a layer may lie across the border of two."""

    def __init__(self, chunk_bytes: int, *, pinned: bool) -> None:
        self._pool = Pool(chunk_bytes, pinned=pinned, what="streamed layers")
        self._free = torch.empty(0, dtype=torch.uint8)

    @property
    def n_bytes(self) -> int:
        return self._pool.n_bytes

    def take(self, n_bytes: int) -> list[Tensor]:
        """Stretches of RAM, `n_bytes` in all."""
        found = []
        while n_bytes:
            if not len(self._free):
                (self._free,) = self._pool.take(1)
            piece, self._free = self._free[:n_bytes], self._free[n_bytes:]
            found.append(piece)
            n_bytes -= len(piece)
        return found


# The streamer of each streamed layer, and the layer's number there.
_streamers: weakref.WeakKeyDictionary[nn.Module, tuple[StreamedLayers, int]] = weakref.WeakKeyDictionary()


def stream_layers(
    model: Any, device: torch.device | str, *, embeddings_stay: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> StreamedLayers:
    """Let the frozen decoder layers of a model in RAM pass through slots on `device`; all else moves there.

    Call it after adapters are attached and before anything moves the model. embeddings_stay: the input embedding
    remains in RAM, for `embeddings_to_ram`. Raises ConfigError for models whose layers cannot be told or have a form
    that cannot be streamed, and ModelError where the slots do not fit.
    """
    device = torch.empty(0, device=device).device
    layers = decoder_layers(model)
    _check(model, layers)
    streamed = StreamedLayers(layers, device, chunk_bytes=chunk_bytes)
    embedding = model.get_input_embeddings() if embeddings_stay else None
    for module in model.modules():
        if module is not embedding:
            _move_own(module, device)
    return streamed


def place_beside_layers(model: Any, device: torch.device) -> None:
    """Move what is neither a decoder layer nor the input embedding from RAM to `device`, the head first of all.

    What is done to it then, such as quantising the head, is done where it is done with layers on the device.
    """
    apart = {module for layer in decoder_layers(model) for module in layer.modules()} | {model.get_input_embeddings()}
    for module in model.modules():
        if module not in apart:
            _move_own(module, device)
    model.hf_device_map = {"": device}  # accelerate asks whether the model is where it trains


def tensors_in_turn(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, as `named_parameters`; those of streamed layers while their values are there."""
    for path, module in model.named_modules():
        if module in _streamers:
            streamer, index = _streamers[module]
            streamer.bring(index)
            streamer.bring_experts(index)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{path}.{name}" if path else name, tensor


def _check(model: Any, layers: list[nn.Module]) -> None:
    kind = type(model).__name__
    if not layers:
        raise ConfigError(FLAG, f"on cannot be used: the decoder layers of {kind} cannot be told; use off")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise ConfigError(FLAG, f"on cannot be used: {kind} cannot recompute its layers; use off")


def _bring(streamed: StreamedLayers, index: int, module: nn.Module, _inputs: Any) -> None:
    streamed.bring(index, goes_on=not module.training)


def _bring_chosen(
    streamed: StreamedLayers, index: int, _experts: nn.Module, inputs: Any, named: dict[str, Any]
) -> None:
    """The experts' only input of whole numbers are those of the chosen ones."""
    given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
    numbers = [value for value in given if not value.is_floating_point() and value.dtype != torch.bool]
    streamed.bring_experts(index, numbers[0] if len(numbers) == 1 else None)


def _refuse_graph(layer: Any, _inputs: Any) -> None:
    """A graph would hold weights that the next layer but one overwrites."""
    if not torch.is_grad_enabled() or (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return
    if any(parameter.requires_grad for parameter in layer.parameters()):
        raise RuntimeError("streamed layers need recomputed ones for gradients (--gradient_checkpointing on)")


def _streamed_tensors(layers: list[nn.Module]) -> list[list[_Streamed]]:
    """What of each layer is streamed: frozen parameters outside adapters, and the constants of quantised ones.

    Raises ConfigError where weights lie in buffers, as those of GPTQ do.
    """
    where: dict[nn.Module, set[int]] = {}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            where.setdefault(module, set()).add(index)
    shared = {module for module, indices in where.items() if len(indices) > 1}
    return [_tensors_of(layer, shared | inside_adapters(layer)) for layer in layers]


def _tensors_of(layer: nn.Module, apart: set[nn.Module]) -> list[_Streamed]:
    by_memory: dict[tuple[Any, ...], _Streamed] = {}
    for module in layer.modules():
        if module in apart:
            continue
        if "qweight" in module._buffers:
            raise ConfigError(FLAG, "on does not go with GPTQ weights; use off, or the model in its unquantised form")
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and is_dense(parameter):
                _slot_of(parameter.data, by_memory).parameters.append(parameter)
        for holder, name, tensor in _constants(module):
            _slot_of(tensor, by_memory).holders.append((holder, name))
        for weight in _of_single_experts(module):
            _slot_of(weight.data, by_memory).experts = module
    return list(by_memory.values())


def _of_single_experts(module: nn.Module) -> list[nn.Parameter]:
    """The weights of experts that can be copied one by one: they lie one behind the other and are read when chosen.

    The latter holds for the classes that transformers lets choose among implementations (`integrations/moe.py`).
    """
    n_experts = getattr(module, "num_experts", 0)
    if not hasattr(module, "is_transposed") or not isinstance(n_experts, int) or n_experts < 1:
        return []
    found = []
    for weight in expert_tensors(module).values():
        state = getattr(weight, "quant_state", None)
        shape = weight.shape if state is None else state.shape
        frozen = not weight.requires_grad and weight.is_contiguous()
        if frozen and shape[0] == n_experts and weight.nbytes % n_experts == 0:
            found.append(weight)
    return found


def _constants(module: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """The tensors of quantised weights that are no parameters, those that an 8-bit layer took over included."""
    yield from quantised_tensors(module)
    state = getattr(module, "state", None)
    for name in ("CB", "SCB"):
        if isinstance(getattr(state, name, None), Tensor):
            yield state, name, getattr(state, name)


def _slot_of(tensor: Tensor, by_memory: dict[tuple[Any, ...], _Streamed]) -> _Streamed:
    """The entry for a tensor; one for all tensors of the same memory and form."""
    return by_memory.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), _Streamed(tensor))


def new_slot(n_bytes: int, device: torch.device) -> Tensor:
    """Memory on the device through which layers pass."""
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _allocate(n_slots: int, slot_bytes: int, device: torch.device) -> list[Tensor]:
    empty_cache()
    try:
        return [new_slot(slot_bytes, device) for _ in range(n_slots)]
    except torch.OutOfMemoryError as reason:
        size = f"{n_slots} x {slot_bytes / 2**20:,.0f} MiB"
        raise ModelError(f"the slots of streamed layers ({size}) do not fit on {device}; use fewer --bits") from reason


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds; streamed weights are there already."""
    for parameter in module.parameters(recurse=False):
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.device != device:
            module._buffers[name] = buffer.to(device)
    for holder, name, tensor in _constants(module):
        if tensor.device != device:
            setattr(holder, name, tensor.to(device))


def _write(source: Tensor, pieces: list[Tensor], start: int) -> None:
    """Copy bytes into `pieces`, which count as one stretch, from `start` on."""
    for piece in pieces:
        if start < len(piece) and len(source):
            n_here = min(len(piece) - start, len(source))
            piece[start : start + n_here].copy_(source[:n_here])
            source, start = source[n_here:], len(piece)
        start -= len(piece)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
