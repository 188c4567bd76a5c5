"""One micro-batch of the real model on fake tensors: what is alive at each operation.

The model of config.json is built by transformers with this project's own adapters and memory saving, and a forward and
backward pass (`chunked_loss.py`) runs over FakeTensors while a dispatch mode counts the storages that are alive. One
layer of each kind is kept; `activation_peak.py` extends what it finds to all.

torch without CUDA cannot record gradients of tensors that claim to be on a card. These are on the CPU, and what a card
does otherwise is stood in for: its attention kernels, its casts under autocast, its masks of dropout and its 8-bit
products. Knows one micro-batch; does not know what lies still (weights, optimizer) or which setup is best.
https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.model.memory import shape_cache
from onecard.model.memory.fake_kernels import FewTiles, KernelStandIns, autocast, bytes_inside, flag_of_cuda
from onecard.model.memory.fake_model import CPU, FakeModel
from onecard.model.memory.gives_way import GIVES_WAY, GaveWay
from onecard.model.memory_saving.activation_offload import ActivationOffload, Pool
from onecard.model.memory_saving.tiled_mlp import tile_mlps

BEFORE, LAYER, LOSS, BACKWARD, AFTER = range(5)  # phases of a micro-batch
MOST_OPERATIONS = 12_000  # of a trace; a layer has some 700, forward, again and backward
CHUNKS = 4  # chunks of the loss that are computed; those between the third and the last take what the third takes
BUFFER_BYTES = 2**50  # in RAM, one for each tensor: pieces would be operations that take no memory of the card
aten = torch.ops.aten
# Of events, in the place of a block: the first product of matrices, for which cuBLAS takes its workspace.
FIRST_PRODUCT = -1
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "bitsandbytes::gemm_4bit",
            "bitsandbytes::int8_scaled_mm")  # fmt: skip


class Part(Enum):
    """What of a training step runs: all of it, or in essence its layers or its loss, the rest as cheap as it can be."""

    WHOLE = "whole"
    LAYERS = "layers"
    LOSS = "loss"


WHOLE_STEP = Part.WHOLE


@dataclass
class MemoryTrace:
    """What was alive at each operation, above what lies still.

    live, phase, layer, names, sizes: for each operation bytes, one of the phases above, the position in the layers that
    were kept, its name, and bytes of new storages. entry: bytes where the first layer begins. kept: what each layer
    left alive in the forward pass. sent: (layer or -1, bytes) of each tensor that went to RAM. blocks: bytes of each
    request to the allocator. events: (number of a block, phase, layer), when it is taken and again when it is let go;
    FIRST_PRODUCT once.
    chunks: how many events there were when each chunk of the loss began.
    """

    live: list[int] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    entry: int = 0
    kept: list[int] = field(default_factory=list)
    sent: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    events: list[tuple[int, int, int]] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)


class TooManyOperations(Exception):
    """More operations than a layer of any size has: the model goes through its tokens one by one."""


class Recorder(TorchDispatchMode):
    """Counts the storages that operations make, and answers where the values of a tensor would be needed.

    What `model` holds from step to step is not counted. n_rows: of tokens of which a loss in chunks computes logits.
    """

    def __init__(self, model: FakeModel, setup: Any, n_rows: int) -> None:
        super().__init__()
        self.on_gpu, self.n_tokens, self.n_rows = setup.on_gpu, setup.tokens, n_rows
        self.n_experts = _n_experts(model.peft)
        self.trace = MemoryTrace()
        self.phase, self.layer, self.most = BEFORE, -1, MOST_OPERATIONS
        self.boundaries: list[int] = []
        self.at_boundary = False
        self._multiplied = False
        self._learned_rows = -1  # the storage of the numbers of supervised tokens
        self.offload: RecordedOffload | None = None
        self._attributes = shape_cache.attributes_of(model.mode)
        self._gives_way = GIVES_WAY.get()
        self._known = {tensor.untyped_storage()._cdata for tensor in _persistent_tensors(model.peft)}
        self._alive: dict[int, tuple[StorageWeakRef, int, int]] = {}  # bytes, and which block; -1: another's by now
        self._live = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call goes through a wrapper of torch.compile's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CPU
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._gives_way():
            raise GaveWay
        if self.at_boundary:
            if self.offload is not None:
                self.offload.settle()  # what the layer leaves, without what is on its way to RAM
            self.boundaries.append(self.live())
            self.at_boundary = False
        answer = self._data_dependent(func, args)
        if answer is not None:
            return answer[0]
        # Autograd adds up two gradients in the memory of one that nobody else holds, but for subclasses of Tensor.
        adds = func is aten.add.Tensor and self.phase >= BACKWARD and not torch.is_grad_enabled()
        reused = _reused(args) if adds else None
        out = shape_cache.run(func, args, kwargs, self._attributes)
        self._record(func, out, args, reused)
        if func is aten.slice.Tensor and args[0].untyped_storage()._cdata == self._learned_rows:
            self.trace.chunks.append(len(self.trace.events))
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the memory of this tensor."""
        self._known.add(tensor.untyped_storage()._cdata)

    def live(self) -> int:
        """Bytes alive now."""
        for key in [*filter(torch.UntypedStorage._expired, self._alive)]:  # a weak reference is the storage's address
            _, n_bytes, block = self._alive.pop(key)
            self._live -= n_bytes
            if block >= 0:
                self.trace.events.append((block, self.phase, self.layer))
        return self._live

    def _take(self, n_bytes: int) -> int:
        """Note a request of so many bytes; returns its number."""
        self.trace.blocks.append(n_bytes)
        self.trace.events.append((len(self.trace.blocks) - 1, self.phase, self.layer))
        return len(self.trace.blocks) - 1

    def _record(self, func: Any, out: Any, args: Any, reused: int | None) -> None:
        self.live()
        size, inside = 0, bytes_inside(func, args, out, self.on_gpu)
        inner, taken_over = [self._take(n_bytes) for n_bytes in inside], -1
        if reused is not None and reused in self._alive:
            ref, n_bytes, taken_over = self._alive[reused]
            self._live -= n_bytes
            self._alive[reused] = (ref, 0, -1)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in self._alive:
                continue
            block = taken_over if taken_over >= 0 else self._take(storage.nbytes())
            taken_over = -1
            self._alive[key] = (StorageWeakRef(storage), storage.nbytes(), block)
            self._live += storage.nbytes()
            size += storage.nbytes()
        trace = self.trace
        if len(trace.live) > self.most:
            raise TooManyOperations
        if not self._multiplied and func._name.partition(".")[0] in PRODUCTS:
            self._multiplied = True
            trace.events.append((FIRST_PRODUCT, self.phase, self.layer))
        trace.events += [(block, self.phase, self.layer) for block in inner]
        trace.live.append(self._live + sum(inside))
        trace.phase.append(self.phase)
        trace.layer.append(self.layer)
        trace.names.append(func._name)
        trace.sizes.append(size)

    def _data_dependent(self, func: Any, args: Any) -> tuple[Any] | None:
        """What an operation gives whose result depends on values, in a tuple; None for all others."""
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return (True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1,)
        if func in (aten.equal.default, aten.is_nonzero.default, aten._has_compatible_shallow_copy_type.default):
            return (True,)
        if func is aten.nonzero.default:
            return (self._nonzero(args[0]),)
        if func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            value, indices = args
            places = [each for index in indices for each in self._unmasked(index)]
            return (self._dispatch(aten.index.Tensor, (value, places), {}),)
        return None

    def _nonzero(self, mask: Tensor) -> Tensor:
        """All places of a mask, but of tokens no more than the loss needs, and of experts' each its equal share."""
        every = torch.empty((mask.numel(), mask.dim()), dtype=torch.int64)
        self._record(aten.nonzero.default, every, (), None)
        if mask.dim() == 2 and mask.shape[1] == self.n_tokens:
            return every[: max(1, mask.numel() // self.n_experts)]
        of_loss = mask.shape == (self.n_tokens,) and self.phase in (BEFORE, LOSS)
        if of_loss:
            self._learned_rows = every.untyped_storage()._cdata
        return every[: self.n_rows] if of_loss else every

    def _unmasked(self, index: Tensor | None) -> list[Tensor | None]:
        return [*self._nonzero(index).unbind(1)] if index is not None and _is_mask(index) else [index]


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _reused(args: Any) -> int | None:
    """The storage that a sum of gradients is written into: of a dense tensor that only autograd holds, not a view.

    As can_accumulate_inplace of torch/csrc/autograd/input_buffer.cpp, with the references that a dispatch adds.
    """
    one, other = args[:2]
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return None
    storage = one.untyped_storage()
    if one._use_count() <= 4 and torch._C._storage_Use_Count(storage._cdata) <= 2 and _is_dense(one):
        return storage._cdata
    return None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class _UncountedPool(Pool):
    """Buffers in RAM that are not counted: one memory stands for all of them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(BUFFER_BYTES, pinned=False)
        self._one = super()._new()
        recorder.ignore(self._one)

    def _new(self) -> Tensor:
        return self._one


class RecordedOffload(ActivationOffload):
    """Notes what goes to RAM; its buffers there were taken by an earlier micro-batch."""

    kinds = (FakeTensor,)

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__(model, CPU)
        self._recorder = recorder
        self._pool = _UncountedPool(recorder)
        recorder.offload = self

    def _pack(self, tensor: Tensor) -> Any:
        packed = super()._pack(tensor)
        if not isinstance(packed, Tensor) and len(self._recorder.trace.sent) < self.n_packed:
            inside = self._recorder.layer if self._recorder.phase == LAYER else -1
            self._recorder.trace.sent.append((inside, tensor.nbytes))
        return packed


def n_supervised(setup: Any) -> int:
    """The most tokens of a micro-batch that are learned: the last of each row predicts nothing that is known."""
    return max(1, setup.rows * (setup.length - 1))


def run(model: FakeModel, setup: Any, part: Part = WHOLE_STEP, *, training: bool = True) -> MemoryTrace:
    """The forward pass of one micro-batch and, in training, its backward pass.

    Of the layers alone the loss is of one token, and of the loss alone there is no backward pass through layers.
    """
    tile_mlps(model.peft, setup.mlp_tile if training else 0, FewTiles)
    model.peft.train(training)
    for module in model.peft.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = setup.gradient_checkpointing
    n_rows = min(n_supervised(setup), CHUNKS * setup.loss_chunk - 1) if setup.loss_chunk else setup.tokens
    n_rows = 1 if part is Part.LAYERS and setup.loss_chunk else n_rows
    recorder = Recorder(model, setup, n_rows)
    with ExitStack() as stack:
        stack.enter_context(model.mode)
        stack.enter_context(flag_of_cuda(setup.on_gpu and setup.element_bytes == 2))
        offload = RecordedOffload(model.peft, recorder) if training and setup.offload_activations else None
        for hook in _track_layers(model.layers, recorder):
            stack.callback(hook.remove)
        for context in (
            recorder,
            KernelStandIns(setup.on_gpu, flash=not setup.repeats_kv),
            torch.set_grad_enabled(training),
        ):
            stack.enter_context(context)
        names = ("input_ids", "labels", "attention_mask", *["position_ids"] * setup.packs_texts)
        batch = {name: torch.zeros(setup.rows, setup.length, dtype=torch.int64) for name in names}
        stack.enter_context(offload or nullcontext())
        with autocast(setup):
            loss, n_units = _loss(model, setup, batch)
        if offload is not None:
            offload.turn_back()
        if training and part is not Part.LOSS:
            recorder.phase, recorder.layer = BACKWARD, len(model.layers) - 1
            _backward(loss / max(1, n_units))
    trace = recorder.trace
    before = [trace.entry, *recorder.boundaries]
    trace.kept = [after - then for then, after in zip(before, recorder.boundaries, strict=False)]
    return trace


def _loss(model: FakeModel, setup: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    from onecard.model.chunked_loss import summed_loss
    from onecard.model.reward_head import rewards

    if setup.gives_reward:
        of_rows = rewards(model.peft, {**batch, "last": torch.zeros(setup.rows, dtype=torch.int64)})
        return of_rows.sum(), setup.rows
    return summed_loss(model.peft, batch, chunk_tokens=setup.loss_chunk)


def _backward(loss: Tensor) -> None:
    """As loss.backward(), which would leave the stand-ins of functions outside."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _persistent_tensors(model: nn.Module) -> list[Tensor]:
    from onecard.model.quantization import quantised_tensors

    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for module in model.modules():
        found += [tensor for _, _, tensor in quantised_tensors(module)]
        scales = getattr(getattr(module, "state", None), "SCB", None)  # an 8-bit layer's after its first product
        found += [scales] if isinstance(scales, Tensor) else []
    return found


def _n_experts(model: Any) -> int:
    """Experts of a layer, from whatever its configuration calls them; 1 without any."""
    from onecard.model.trained import base_of

    waiting, found = [base_of(model).config.get_text_config().to_dict()], [1]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int) and re.search("num_(local_)?experts$|n_routed_experts$", name):
                found.append(value)
    return max(found)


def _track_layers(layers: list[nn.Module], recorder: Recorder) -> Iterator[Any]:
    """Let the recorder know which layer is at work, forward and backward; yields the hooks."""

    def begin(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if recorder.phase < BACKWARD:
                recorder.phase, recorder.layer = LAYER, number
                if number == 0:
                    recorder.trace.entry = recorder.live()
            else:
                recorder.layer = number

        return hook

    def end(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if recorder.phase >= BACKWARD:
                return
            recorder.at_boundary = True
            recorder.phase = LOSS if number == len(layers) - 1 else LAYER
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(begin(number))

        return hook

    for number, layer in enumerate(layers):
        yield layer.register_forward_pre_hook(begin(number))
        yield layer.register_forward_hook(end(number))
