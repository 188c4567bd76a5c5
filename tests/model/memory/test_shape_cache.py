"""Operations on fake tensors give the same from the cache as from torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan_accuracy import toy_config
from onecard.model.memory import shape_cache
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig
from onecard.model.memory.fake_model import build
from onecard.model.memory.simulate import run

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a new tensor": lambda one, other: one @ other.t(),
    "another layout": lambda one, other: torch.empty_like(one.t(), dtype=torch.bfloat16),
    "views": lambda one, other: one.t()[1:].unflatten(1, (2, 4)).chunk(2, dim=2),
    "a view of a view": lambda one, other: one.t()[1:].expand(5, 6, 8)[:, 2:],
    "in place": lambda one, other: one.add_(other).t_(),
    "into another": lambda one, other: torch.mul(one, 2, out=other),
    "another size": lambda one, other: other.resize_(3, 3),
    "several": lambda one, other: torch.var_mean(one, dim=1),
    "two of one memory": lambda one, other: one.mul(one).view_as(other),
    "lists": lambda one, other: torch.cat([one, other[:, :3]], dim=1),
    "numbers": lambda one, other: (one * 2, one * 2.0, one.long() * 2, one.long() * 2.0, one.long() * True),
    "complex": lambda one, other: torch.view_as_complex(one.view(8, 7, 1).expand(8, 7, 2).contiguous()).real,
    "arguments by name": lambda one, other: one.sum(dim=0, keepdim=True, dtype=torch.float64),
}


class Cached(TorchDispatchMode):
    """As the recorder of a trace calls it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.attributes = shape_cache.attributes_of(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return shape_cache.run(func, args, kwargs or {}, self.attributes)


@pytest.fixture(autouse=True)
def no_entries() -> Iterator[None]:
    shape_cache._entries.clear()
    yield
    shape_cache._entries.clear()


def form(tensor: Tensor, inputs: list[Tensor]) -> tuple[Any, ...]:
    """What a trace sees of a tensor: its form, its memory, and whose that is."""
    storage = tensor.untyped_storage()
    owner = [number for number, each in enumerate(inputs) if each.untyped_storage()._cdata == storage._cdata]
    assert type(tensor) is FakeTensor and tensor.device.type == "cpu"
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), storage.nbytes(), owner


def outcome(operation: Callable[[Tensor, Tensor], Any], cached: bool) -> list[Any]:
    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(8, 7), torch.empty(8, 7)]
        if cached:
            with Cached(mode):
                out = operation(*inputs)
        else:
            out = operation(*inputs)
        every = out if isinstance(out, (tuple, list)) else [out]
        return [form(each, inputs) for each in (*every, *inputs)] + [each._version for each in inputs]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_made_again_is_as_the_first(name: str) -> None:
    operation = OPERATIONS[name]
    wanted = outcome(operation, cached=False)
    assert [outcome(operation, cached=True) for _ in range(3)] == [wanted] * 3


def test_a_form_is_the_same_from_torch_alone_as_from_a_mode_of_fake_tensors(monkeypatch) -> None:
    """Of every operation of three training steps: strides, memory and all."""
    alone, of_mode, compared, waiting = shape_cache._entry_on_meta, shape_cache._entry, Counter(), []

    def hold_back(func: Any, args: Any, kwargs: Any) -> None:
        waiting[:] = [(func, alone(func, args, kwargs))]

    def entry(out: Any, inputs: list[Tensor]) -> Any:
        found = of_mode(out, inputs)
        if waiting and waiting[0][1] is not None and any(isinstance(each, FakeTensor) for each in inputs):
            func, made = waiting.pop()
            assert made == found, func
            compared[func] += 1
        return found

    monkeypatch.setattr(shape_cache, "_entry_on_meta", hold_back)
    monkeypatch.setattr(shape_cache, "_entry", entry)
    model = architecture_of(toy_config("qwen3_moe", num_hidden_layers=2))
    for bits, changes in ((4, {"head_bits": 8, "offload_activations": True}), (8, {"mlp_tile": 100, "rows": 2}),
                          (32, {"on_gpu": False, "element_bytes": 4, "gradient_checkpointing": False})):  # fmt: skip
        setup = MemoryConfig(**{"bits": bits, "element_bytes": 2, "rows": 1, "length": 300, "loss_chunk": 64} | changes)
        run(build(model.source.read()[0], setup), setup)
    assert len(compared) > 50 and compared.total() > 400


def test_most_results_come_from_the_cache_and_it_does_not_grow_without_end(monkeypatch) -> None:
    calls = []

    def counted(one: Tensor) -> Tensor:
        calls.append(one.shape)
        return torch.ops.aten.relu.default(one)

    monkeypatch.setattr(shape_cache, "MOST_ENTRIES", 4)
    mode = FakeTensorMode()
    with mode:
        attributes = shape_cache.attributes_of(mode)
        for size in (2, 2, 3, 2, 3):
            shape_cache.run(counted, (torch.empty(size),), {}, attributes)
        assert [tuple(shape) for shape in calls] == [(2,), (3,)]
        for size in range(20):
            shape_cache.run(counted, (torch.empty(size),), {}, attributes)
            assert len(shape_cache._entries) <= 4


def test_a_result_that_is_a_part_of_its_memory_is_asked_for_again() -> None:
    mode = FakeTensorMode()
    with mode:
        for _ in range(2):
            part = shape_cache.run(lambda one: one.clone()[:3], (torch.empty(8),), {}, shape_cache.attributes_of(mode))
            assert part.untyped_storage().nbytes() == 32


def test_a_result_lives_as_long_as_it_is_held() -> None:
    """A trace counts what is alive: no entry may hold a tensor."""
    mode = FakeTensorMode()
    with mode, Cached(mode):
        one = torch.empty(8, 7)
        for _ in range(2):
            storage = torch.relu(one).untyped_storage()
            memory = torch.multiprocessing.reductions.StorageWeakRef(storage)
            del storage
            assert memory.expired()
