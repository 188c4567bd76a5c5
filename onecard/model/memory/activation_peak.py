"""The peak memory of a micro-batch of the whole model, from a few memory traces.

Each operation of `simulate.py` holds a number of bytes that is affine in the tokens as long as the same operations run,
and grows by what each layer keeps. So two lengths are traced of each stretch in which the techniques act alike, and
every other length lies on the lines through them. Knows an `Architecture` and a `MemoryConfig`;
adds no weights or optimizer state.
"""

from __future__ import annotations

import math
import random
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from onecard.config.lora import LoraOptions
from onecard.console import warn
from onecard.errors import ModelError
from onecard.model.chunked_loss import CHUNK_BYTES_PER_LOGIT
from onecard.model.memory import fake_model
from onecard.model.memory.simulate import BACKWARD, LAYER, LOSS, MemoryTrace, TooManyOperations, run
from onecard.model.memory_saving.activation_offload import MIN_BYTES

SHORT_ROWS, SHORT_CHUNK = (24, 48), 4  # for models that go through their tokens one by one
LOOPS = (2, 3, 4)  # operations
SHORTEST = 512  # tokens of the first length that is traced where no technique sets a limit


@dataclass(frozen=True)
class ActivationPeak:
    """The most bytes that come and go in a micro-batch: what the layers keep, the rest, and what goes on then.

    batch: the ids and what is made of them once, among `rest`. sent: bytes of each tensor that waits in RAM.
    """

    inputs: int
    rest: int
    batch: int
    phase: int
    sent: tuple[int, ...] = ()

    @property
    def n_bytes(self) -> int:
        return self.inputs + self.rest


def find_peak(model: Any, setup: Any) -> ActivationPeak:
    """The peak of a micro-batch of `setup`; for a family that cannot run so a rough one, with a warning.

    Nothing of it stays in the process but what is cached: a plan must not change the training after it.
    """
    try:
        with _isolated():
            return _simulated_peak(model, setup)
    except TooManyOperations:
        _warn_once(f"{model.name} ({model.model_type}) goes through its tokens in too many operations")
    except ModelError as reason:
        _warn_once(str(reason))
    except Exception as reason:  # a plan that cannot be made must not stop a training run
        _warn_once(_cannot_be_planned(model, reason))
    return _rough_estimate(model, setup)


@contextmanager
def _isolated() -> Iterator[None]:
    """Restore the states of random generators, the default dtype, the mode of gradients and the filters of warnings."""
    dtype, python_state, numpy_state = torch.get_default_dtype(), random.getstate(), np.random.get_state()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _cannot_be_planned(model: Any, reason: Exception) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()] or [type(reason).__name__]
    return f"the memory of {model.name} ({model.model_type}) cannot be planned: {lines[0]}"


def _simulated_peak(model: Any, setup: Any) -> ActivationPeak:
    found = _at_size(model, _without_optimizer(setup))
    lines, live = found.trace, found.live
    before, whole = found.kept_before(LoraOptions(setup.peft_method).n_last_layers)
    traced = np.concatenate([[0.0], np.cumsum(found.kept)])
    extra, inputs = np.zeros(len(live)), np.zeros(len(live))
    phase, layer = np.array(lines.phase), np.array(lines.layer)
    for position in range(len(found.kept) if found.kinds else 0):
        here = (layer == position) & ((phase == LAYER) | (phase == BACKWARD))
        extra[here] = before[position] - traced[position]
        inputs[here] = before[position]
    at_loss = (phase == LOSS) & bool(found.kinds)
    extra[at_loss], inputs[at_loss] = whole - traced[-1], whole
    total = live + extra
    worst = int(total.argmax())
    batch = max(0, round(found.entry - setup.tokens * model.hidden_size * setup.element_bytes))
    kept = min(round(inputs[worst]), round(total[worst]))
    return ActivationPeak(kept, round(total[worst]) - kept, batch, int(phase[worst]), found.sent())


@cache
def _warn_once(reason: str) -> None:
    warn(f"{reason}; what its layers take is a rough estimate")


def _rough_estimate(model: Any, setup: Any) -> ActivationPeak:
    """All linear layers of a decoder layer with input and output, three times in fp32, and the logits of a chunk."""
    hidden = setup.tokens * model.hidden_size * setup.element_bytes
    widths = sum(each.count * (each.n_in + each.n_out) for each in (*model.linears, *model.experts)) / model.n_layers
    n_layers = 1 if setup.gradient_checkpointing else model.n_layers
    n_rows = min(setup.loss_chunk or setup.tokens, setup.tokens)
    logits = n_rows * model.vocab_size * CHUNK_BYTES_PER_LOGIT[8 * setup.element_bytes]
    return ActivationPeak(model.n_layers * hidden, round(12 * setup.tokens * widths) * n_layers + logits, 0, BACKWARD)


@dataclass(frozen=True)
class _Sample:
    """A trace, or the lines through several, at one size."""

    trace: MemoryTrace
    live: np.ndarray
    kept: np.ndarray
    entry: float
    sizes: np.ndarray
    kinds: list[int]
    """For each layer of the whole model the position of the traced one that stands for it."""

    def kept_before(self, n_trained: int) -> tuple[list[float], float]:
        """What all layers before the last of each traced kind keep, and what all do.

        n_trained: how many of the last layers have something that is trained in them or before them; 0: all.
        """
        first = len(self.kinds) - n_trained if n_trained else 0
        kept = [self.kept[kind] * (number >= first) for number, kind in enumerate(self.kinds)]
        sums = np.concatenate([[0.0], np.cumsum(kept)])
        last = {kind: number for number, kind in enumerate(self.kinds)}
        return [float(sums[last[position]]) for position in range(len(self.kept))], float(sums[-1])

    def sent(self) -> tuple[int, ...]:
        """Bytes of each tensor that the whole model sends to RAM."""
        of_layer: list[list[int]] = [[] for _ in range(len(self.kept) + 1)]
        for (layer, _), size in zip(self.trace.sent, self.sizes, strict=True):
            of_layer[layer].append(round(size))
        return tuple(size for kind in [*self.kinds, -1] for size in of_layer[kind])


def _without_optimizer(setup: Any) -> Any:
    """The setup without what changes nothing in a micro-batch."""
    return replace(setup, optimizer="adamw", offload_embeddings=False)


def _at_size(model: Any, setup: Any) -> _Sample:
    try:
        return _interpolated(model, setup)
    except TooManyOperations:
        return _from_short_rows(model, setup)


def _interpolated(model: Any, setup: Any) -> _Sample:
    by_rows = setup.rows > 1
    size, per = (setup.rows, setup.length) if by_rows else (setup.length, 1)
    points = _sample_sizes(size, [limit / per for limit in _breakpoints(model, setup)], 2 if by_rows else 1, by_rows)
    if size in points:
        return _traced(model, setup)
    name = "rows" if by_rows else "length"
    found = [_traced(model, replace(setup, **{name: point})) for point in points]
    middle = sum(points) // 2
    one, other = found
    if not _operations_differ(one, other) and _is_quadratic(one, other, points) and middle not in points:
        points.append(middle)
        found.append(_traced(model, replace(setup, **{name: middle})))
    if any(_operations_differ(one, each) for each in found[1:]):
        return _traced(model, setup)
    return _extrapolated(found, points, size)


def _from_short_rows(model: Any, setup: Any) -> _Sample:
    """Of a model whose operations are as many as its tokens: from short rows, by the worst moment of each phase.

    They have as many chunks of the loss as long ones, smaller ones; the logits that are missing are added. MLPs in
    tiles and layer inputs in RAM are left out of account, so that it is an estimate from above.
    """
    short = replace(setup, loss_chunk=SHORT_CHUNK if setup.loss_chunk else 0, mlp_tile=0, offload_activations=False)
    found = [_peak_by_phase(_traced(model, replace(short, length=length))) for length in SHORT_ROWS]
    found_at = _extrapolated(found, [*SHORT_ROWS], setup.length)
    if not setup.loss_chunk:
        return found_at
    n_rows = max(0, min(setup.loss_chunk, setup.tokens) - SHORT_CHUNK)
    logits = n_rows * model.vocab_size * CHUNK_BYTES_PER_LOGIT[8 * setup.element_bytes]
    return replace(found_at, live=found_at.live + logits * (np.array(found_at.trace.phase) == LOSS))


def _peak_by_phase(found: _Sample) -> _Sample:
    """The worst moment of each phase of each layer alone."""
    places = [*zip(found.trace.phase, found.trace.layer, strict=True)]
    worst: dict[tuple[int, int], float] = {}
    for place, live in zip(places, found.live, strict=True):
        worst[place] = max(worst.get(place, 0.0), float(live))
    trace = replace(found.trace, phase=[phase for phase, _ in worst], layer=[layer for _, layer in worst])
    return replace(found, trace=trace, live=np.array([*worst.values()]))


def _extrapolated(found: list[_Sample], points: list[int], size: int) -> _Sample:
    """The line through two traces, or the parabola through three, at `size`."""
    weights = [math.prod((size - q) / (p - q) for q in points if q != p) for p in points]
    values: dict[str, Any] = {
        key: sum(weight * getattr(each, key) for weight, each in zip(weights, found, strict=True))
        for key in ("live", "kept", "entry", "sizes")
    }
    return replace(found[-1], **values)


def _sample_sizes(size: int, limits: list[float], smallest: int, by_rows: bool) -> list[int]:
    """Two sizes in the stretch between two limits in which `size` lies."""
    edges = sorted({math.floor(limit) for limit in limits if limit >= smallest})
    place = bisect_left(edges, size)
    low = edges[place - 1] if place else smallest - 1
    if place < len(edges):
        high = edges[place]
        middle = low + max(1, (high - low) // 3)
        return [middle, high] if middle < high else [size]
    first = max(low + 1, smallest, *([math.ceil(1.5 * low)] if place else []))
    return [first, first + 1] if by_rows else [max(first, SHORTEST), 2 * max(first, SHORTEST)]


def _breakpoints(model: Any, setup: Any) -> list[int]:
    """Numbers of tokens up to which other operations run than beyond; see `_sample_sizes`."""
    found = []
    for piece in (setup.loss_chunk, setup.mlp_tile):
        found += [piece, 2 * piece] if piece else []
    if setup.offload_activations:
        # fp32 inputs of norms are sent before those of layers are.
        found += [-(-MIN_BYTES // (model.hidden_size * width)) - 1 for width in {4, setup.element_bytes}]
    return found + ([*model.source.windows] if setup.rows == 1 else [])


def _operations_differ(one: _Sample, other: _Sample) -> bool:
    """Whether other operations ran, or other tensors went to RAM."""
    sent = [[layer for layer, _ in found.trace.sent] for found in (one, other)]
    return one.trace.names != other.trace.names or sent[0] != sent[1]


def _is_quadratic(one: _Sample, other: _Sample, points: list[int]) -> bool:
    """Whether some tensor grows with the square."""
    first, second = np.array(one.trace.sizes), np.array(other.trace.sizes)
    return bool((second > 1.02 * first * points[1] / points[0] + 4096).any())


# How to build a model, the most exact first: some models count on all of their layers, or on a mask.
BUILD_OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"unpacked": False},
    {"whole": True},
    {"whole": True, "unpacked": False},
)
_working_options: dict[Any, dict[str, bool]] = {}
_failed: dict[Any, str] = {}


@lru_cache(maxsize=512)
def _traced(model: Any, setup: Any) -> _Sample:
    apart = replace(setup, rows=1, length=1, loss_chunk=0, mlp_tile=0, offload_activations=False)
    key = (model, apart)
    if key in _failed:  # one failure stands for all sizes: a plan asks for many
        raise ModelError(_failed[key])
    reasons: list[Exception] = []
    for options in [_working_options[key]] if key in _working_options else BUILD_OPTIONS:
        try:
            built = _built(model, apart, *options.items())
            trace = _without_loops(run(built, setup))
        except TooManyOperations:
            _working_options[key] = options
            raise
        except Exception as reason:  # whatever a model's own code does not expect of tensors without values
            reasons.append(reason)
            continue
        _working_options[key] = options
        kept = np.array(trace.kept, dtype=float)
        sizes = np.array([size for _, size in trace.sent], dtype=float)
        return _Sample(trace, np.array(trace.live, dtype=float), kept, float(trace.entry), sizes, built.kinds)
    _failed[key] = _cannot_be_planned(model, reasons[0])
    raise ModelError(_failed[key]) from reasons[0]


def _without_loops(trace: MemoryTrace) -> MemoryTrace:
    """The trace with each loop of a few operations, such as over pieces of a tensor, as one round of them."""
    every = [*zip(trace.names, trace.phase, trace.layer, trace.live, trace.sizes, strict=True)]
    kept: list[tuple[str, int, int, int, int]] = []
    for one in every:
        kept.append(one)
        for n in LOOPS:
            if len(kept) >= 2 * n and [k[:3] for k in kept[-n:]] == [k[:3] for k in kept[-2 * n : -n]]:
                again = [kept.pop() for _ in range(n)][::-1]
                rounds = zip(kept[-n:], again, strict=True)
                kept[-n:] = [(*a[:3], max(a[3], b[3]), max(a[4], b[4])) for a, b in rounds]
                break
    names, phase, layer, live, sizes = (list(column) for column in zip(*kept, strict=True))
    return replace(trace, names=names, phase=phase, layer=layer, live=live, sizes=sizes)


@lru_cache(maxsize=4)
def _built(model: Any, setup: Any, *options: tuple[str, bool]) -> Any:
    config, own_code = model.source.read()
    return fake_model.build(config, setup, **dict(options), **own_code)
