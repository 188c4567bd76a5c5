"""Bytes that tensors take on a CPU, counted from outside: by torch's own profiler, and by walking over a run.

The profiler sees every allocation and release of torch's CPU allocator, those inside operators too. What oneDNN takes
inside one matrix product and gives back before it ends is scratch of the kernel and no tensor, so it is left out.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors took during `work`, above what there was before."""
    with _no_garbage_collected(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    memory = [(event.nbytes(), event.start_ns()) for event in events if event.name() == "[memory]"]
    assert memory, "the profiler saw no allocation"
    products = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in MATRIX_PRODUCTS]
    scratch = set(_scratch(memory, products))
    live = peak = 0
    for number, (n_bytes, _) in enumerate(memory):
        if number not in scratch:
            live += n_bytes
            peak = max(peak, live)
    return peak


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Memory that was taken under an earlier profile and is let go within this one would count as less than nothing."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _scratch(memory: list[tuple[int, int]], products: list[tuple[int, int]]) -> Iterator[int]:
    """Numbers of the events that take memory and give it back at once within one matrix product."""
    starts = [start for start, _ in products]
    for number in range(len(memory) - 1):
        (taken, when), (given, later) = memory[number], memory[number + 1]
        if taken <= 0 or given != -taken:
            continue
        product = bisect_right(starts, when) - 1
        if product >= 0 and later <= products[product][1]:
            yield from (number, number + 1)


def held_bytes(*holders: Any) -> int:
    """Bytes of all tensors that models and optimizers hold: weights, quantisation constants, gradients, state."""
    seen: dict[int, int] = {}
    for tensor in _tensors(holders, {}):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(seen.values())


def _tensors(value: Any, visited: dict[int, Any]) -> Iterator[torch.Tensor]:
    if id(value) in visited:
        return
    visited[id(value)] = value  # held, so that its number is not given to another object
    if isinstance(value, torch.Tensor):
        yield value.data if isinstance(value, torch.nn.Parameter) else value
        yield from _tensors([value.grad, *vars(value).values()] if value.is_leaf else [], visited)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), visited)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner, visited)
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors([list(value.state.values()), [group["params"] for group in value.param_groups]], visited)
    elif isinstance(value, torch.nn.Module):
        yield from _tensors([*value.parameters(), *value.buffers()], visited)
        for module in value.modules():
            yield from _tensors([getattr(module, name, None) for name in ("state", "shira_indices")], visited)
    elif type(value).__module__.startswith("bitsandbytes"):
        yield from _tensors(list(vars(value).values()), visited)
