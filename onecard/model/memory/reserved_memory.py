"""What a step reserves beyond its tensors.

What a freed block leaves serves no larger request, and may be cut for smaller ones, so that what is reserved depends on
the order of all requests. Traces have them for the first layer, the last and one of each kind between; here they become
those of all layers, and are replayed by the arithmetic of `caching_allocator.py` or `growing_segments.py` on top of
those of `loading.py`. Knows samples of traces and numbers of bytes; `activation_peak.py` knows what is alive.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from onecard.config.lora import LoraOptions
from onecard.model.memory.activation_peak import isolated, nameless, samples_of_step
from onecard.model.memory.architecture import Architecture
from onecard.model.memory.caching_allocator import CachingAllocator, OutOfRoom, Requests
from onecard.model.memory.extrapolate import Sample, sample_at_size
from onecard.model.memory.growing_segments import GrowingSegments
from onecard.model.memory.loading import loading, preparing
from onecard.model.memory.simulate import BACKWARD, BEFORE, CHUNKS, FIRST_PRODUCT, LAYER, LOSS, Part, n_supervised

PRECISION, LITTLE = 0.008, 0.003  # of the bytes of tensors: how closely the smallest limit is looked for
LARGEST_LEAK = 0.02  # of the tensors of a step, by which its requests may be off what is alive in its trace
MICRO_BATCHES = 2  # in a row, with nothing given back between them: the second finds other free blocks than the first
# cuBLAS takes two buffers of 4 MiB and eight of 16 KiB from the allocator, unless CUBLAS_WORKSPACE_CONFIG says
# otherwise; more from sm_90 on. https://docs.nvidia.com/cuda/cublas/#cublassetworkspace
CUBLAS_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
# What differs between plans of one model, and neither loading nor what lies still depends on.
ONE_MICRO_BATCH = {"rows": 1, "length": 1, "loss_chunk": 0, "mlp_tile": 0, "offload_activations": False,
                   "gradient_checkpointing": True}  # fmt: skip

Section = tuple[int, int]  # phase, and the position of the layer; -1 for none
_Piece = tuple[list[int], list[int]]  # blocks of other sections that are let go first, and events of its own


@lru_cache(maxsize=1024)
def reserved_beyond_tensors(model: Architecture, setup: Any, moving: int, spare: int | None = None) -> int | None:
    """Bytes that must be reserved beyond those of tensors for a step to run; None where its requests are not known.

    moving: the most bytes of tensors that come and go in the step, by which its requests are checked. spare: where the
    question is only whether so many will do; then it is these, or one more.
    """
    if setup.n_cards > 1 or setup.n_shards > 1 or LoraOptions(setup.peft_method).n_last_layers:
        return None
    try:
        with isolated():
            samples = _samples_with_requests(model, setup)
    except Exception:  # `find_peak` has warned of it
        return None
    if not all(found.trace.events and found.kinds for found in samples):
        return None
    step, ends, first_product = requests_of_step(samples[0], samples[-1], setup)
    most_alive = step.most_alive()
    if abs(most_alive - moving) > LARGEST_LEAK * moving:
        return None
    ready, still, gradients = _made_ready(model, replace(setup, **ONE_MICRO_BATCH))
    allocator = ready.copy(math.inf)
    allocator.serve(_first_micro_batch(step, ends, first_product, gradients))
    allocator.give_back()
    tensors = still + most_alive
    if spare is not None:
        return spare if _Replays(allocator, step).run(tensors + spare, tensors) else spare + 1
    return smallest_limit(allocator, step, tensors) - tensors


def _first_micro_batch(step: Requests, ends: list[int], first_product: int, gradients: list[list[int]]) -> Requests:
    """The requests of the micro-batch that makes the gradients, which stay, and so does cuBLAS' workspace.

    The first gradient of a parameter stays where it was computed; one that is not found is made when its layer is
    through. It would matter little for small ones, but one of more than 1 MiB holds a large segment.
    """
    kept: set[int] = set()
    made: dict[int, list[int]] = {}
    begin = max(0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0
    for end, sizes in zip(ends, reversed(gradients[:-1]), strict=True):
        wanted = Counter(sizes)
        for event in step.events[begin:end]:
            if event >= 0 and wanted.get(step.sizes[event], 0) > 0:
                wanted[step.sizes[event]] -= 1
                kept.add(event)
        made[end], begin = [*wanted.elements()], end
    made[ends[-1]] += gradients[-1]
    first = Requests([*step.sizes])
    places = sorted({0, first_product, *made})
    for begin, end in zip(places, [*places[1:], len(step.events)], strict=True):
        for n_bytes in [*[CUBLAS_WORKSPACE_BYTES] * (begin == first_product), *made.get(begin, ())]:
            first.take(n_bytes)
        first.events += [event for event in step.events[begin:end] if ~event not in kept]
    return first


@lru_cache(maxsize=64)
def _made_ready(model: Architecture, setup: Any) -> tuple[CachingAllocator, int, list[list[int]]]:
    """The allocator before the first step, bytes of all tensors that lie still then, and those of the gradients."""
    base, (beside, gradients) = loading(model, setup), preparing(model, setup)
    allocator = GrowingSegments() if setup.expandable_segments else CachingAllocator()
    allocator.serve(base)
    if setup.stream_layers:  # whose slots are taken after that
        allocator.give_back()
    allocator.serve(beside)
    allocator.give_back()
    if isinstance(allocator, GrowingSegments):  # whose rests depend on the order in which a checkpoint is loaded
        allocator.use_up()
    return allocator, base.left() + beside.left() + sum(map(sum, gradients)), gradients


def _samples_with_requests(model: Architecture, setup: Any) -> list[Sample]:
    """Traced at this size where a loop over pieces of a tensor has another number of rounds at smaller ones."""
    found = samples_of_step(model, setup)
    parts = [Part.LAYERS, Part.LOSS] if len(found) > 1 else [Part.WHOLE]
    return [
        each if each.trace.events or not each.trace.blocks else sample_at_size(nameless(model), setup, part)
        for each, part in zip(found, parts, strict=True)
    ]


def smallest_limit(allocator: CachingAllocator, step: Requests, tensors: int) -> int:
    """Bytes of the smallest limit that the step runs under, among halvings between `tensors` and what it reserves."""
    replays = _Replays(allocator, step)
    too_few, enough = tensors, replays.most_reserved()
    while enough - too_few > PRECISION * tensors:
        middle = (too_few + enough) // 2
        if replays.run(middle, tensors):
            enough = middle
        else:
            too_few = middle
    return enough


class _Replays:
    """Replays of micro-batches from one state of an allocator; one stands for all limits under which it goes the same
    way."""

    def __init__(self, allocator: CachingAllocator, step: Requests) -> None:
        self.allocator, self.step = allocator, step
        self._known: list[tuple[int, float, bool]] = []  # from a limit to below another one, whether it runs

    def most_reserved(self) -> int:
        """Without a limit."""
        self._runs(math.inf)
        return self._known[-1][0]

    def run(self, limit: int, tensors: int) -> bool:
        """Whether it runs under a limit, and under a little less: one may do by chance, and a larger one not."""
        return self._runs(limit) and self._runs(limit - int(LITTLE * tensors))

    def _runs(self, limit: float) -> bool:
        for low, high, ran in self._known:
            if low <= limit < high:
                return ran
        allocator, ran = self.allocator.copy(limit), True
        try:
            for _ in range(MICRO_BATCHES):
                allocator.serve(self.step)
        except OutOfRoom:
            ran = False
        self._known.append((allocator.most_reserved, allocator.refused, ran))
        return ran


def _with_all_chunks(loss: Sample, setup: Any) -> Sample:
    """With as many chunks of the loss as there are: the third for all that were left out, the last in its true size.

    That one was traced with one token less than the others, so what it takes with any other number is on a line.
    """
    if len(loss.trace.chunks) < CHUNKS:
        return loss
    events, (third, last) = loss.trace.events, loss.trace.chunks[-2:]
    first, after = (1 + max(block for block, *_ in events[:place]) for place in (third, last))
    n_blocks, n_more = after - first, max(3, -(-n_supervised(setup) // setup.loss_chunk)) - CHUNKS

    def later(part: list[tuple[int, int, int]], n_chunks: int) -> list[tuple[int, int, int]]:
        by = n_chunks * n_blocks
        return [(block + by if block >= first - n_blocks else block, phase, layer) for block, phase, layer in part]

    whole, missing = loss.blocks[first:after], -n_supervised(setup) % setup.loss_chunk
    of_last = whole - missing * (whole - loss.blocks[after : after + n_blocks])
    return replace(
        loss,
        trace=replace(
            loss.trace,
            events=[
                *events[:third],
                *(event for number in range(n_more + 1) for event in later(events[third:last], number)),
                *later(events[last:], n_more),
            ],
        ),
        blocks=np.concatenate([loss.blocks[:first], *[whole] * (n_more + 1), of_last, loss.blocks[after + n_blocks :]]),
    )


class _Trace:
    """The events of a sample by section, and which blocks outlive the section that takes them."""

    def __init__(self, found: Sample) -> None:
        self.blocks, self.n_layers = found.blocks, len(found.kept)
        self.sections: dict[Section, list[int]] = {}
        self.taken_in: dict[int, Section] = {}
        let_go_in: dict[int, Section] = {}
        for block, phase, layer in found.trace.events:
            section = (phase, layer if phase in (LAYER, BACKWARD) else -1)
            self.sections.setdefault(section, []).append(block)
            if block == FIRST_PRODUCT:
                continue
            (let_go_in if block in self.taken_in else self.taken_in)[block] = section
        self.rank: dict[int, int] = {}  # of a block among those that outlive its section, the last one 0
        n_left: dict[Section, int] = {}
        for block, section in reversed(self.taken_in.items()):
            if let_go_in.get(block) != section:
                self.rank[block] = n_left.setdefault(section, 0)
                n_left[section] += 1
        # What a layer leaves to one further on than the next: by phase and rank, how far.
        self.far: dict[int, dict[int, int]] = {}
        # The gradient of the hidden states, to which all layers add where it lies: from the last one to the first.
        self.whole_way: set[int] = set()
        for block, (phase, position) in self.taken_in.items():
            until = let_go_in.get(block, (-1, -1))
            if until[0] != phase or abs(until[1] - position) < 2:
                continue
            if phase == BACKWARD and (position, until[1]) == (self.n_layers - 1, 0):
                self.whole_way.add(block)
            else:
                self.far.setdefault(phase, {})[self.rank[block]] = until[1] - position
        self._requests: dict[Section, tuple[list[int], list[_Piece], list[tuple[int, int]]]] = {}

    def requests_of(self, section: Section) -> tuple[list[int], list[_Piece], list[tuple[int, int]]]:
        """Sizes of a section's requests, its events numbered from 0 on, and (rank, request) of what outlives it.

        Between pieces of events blocks of other sections are let go: those are named by what the trace calls them; so
        is the first product.
        """
        if section not in self._requests:
            sizes: list[int] = []
            pieces: list[_Piece] = [([], [])]
            number: dict[int, int] = {}
            for block in self.sections.get(section, ()):
                if block in number:
                    pieces[-1][1].append(~number[block])
                elif block != FIRST_PRODUCT and self.taken_in[block] == section:
                    number[block] = len(sizes)
                    pieces[-1][1].append(len(sizes))
                    sizes.append(round(self.blocks[block]))
                elif pieces[-1][1]:
                    pieces.append(([block], []))
                else:
                    pieces[-1][0].append(block)
            left = [(self.rank[block], request) for block, request in number.items() if block in self.rank]
            self._requests[section] = sizes, pieces, left
        return self._requests[section]


class _Writer:
    """Writes the requests of a section of a trace for a layer of the whole model.

    A section lets go of what an earlier one left, its own layer's or a neighbour's: the block of the same rank.
    """

    def __init__(self, n_layers: int) -> None:
        self.n_layers, self.requests, self.first_product = n_layers, Requests(), 0
        self._left: dict[tuple[int, int, int], int] = {}  # by phase, number of the layer, and rank

    def write(self, trace: _Trace, section: Section, number: int) -> None:
        """number: of the layer, -1 for what is of none."""
        for rank, distance in trace.far.get(section[0], {}).items():
            self._let_go((section[0], number - distance, rank))
        sizes, pieces, left = trace.requests_of(section)
        first = len(self.requests.sizes)
        self.requests.sizes += sizes
        for others, events in pieces:
            for block in others:
                if block == FIRST_PRODUCT:
                    self.first_product = self.first_product or len(self.requests.events)
                    continue
                self._let_go(self._key(trace, block, section, number))
            self.requests.events += [event + first if event >= 0 else event - first for event in events]
        self._left.update(((section[0], number, rank), first + request) for rank, request in left)

    def let_all_go(self) -> None:
        """What nothing in the trace let go of is let go after the step."""
        self.requests.let_go(*self._left.values())
        self._left.clear()

    def _let_go(self, key: tuple[int, int, int]) -> None:
        request = self._left.pop(key, -1)
        if request >= 0:
            self.requests.let_go(request)

    def _key(self, trace: _Trace, block: int, section: Section, number: int) -> tuple[int, int, int]:
        """Of a block that another section left, where it is found: layers are as far apart as in the trace."""
        phase, position = trace.taken_in[block]
        if position < 0:
            return phase, -1, trace.rank[block]
        if block in trace.whole_way:
            return phase, self.n_layers - 1, trace.rank[block]
        here, there = (section[1], number) if section[1] >= 0 else (trace.n_layers - 1, self.n_layers - 1)
        return phase, there + position - here, trace.rank[block]


def requests_of_step(layers: Sample, loss: Sample, setup: Any) -> tuple[Requests, list[int], int]:
    """All requests of a micro-batch of the whole model; how many events there are when each layer is through, the last
    layer first; and how many at the first product of matrices.

    loss: where it was traced apart, else the same sample.
    """
    of_layers, of_loss = _Trace(layers), _Trace(_with_all_chunks(loss, setup))
    kinds, ends = [*enumerate(layers.kinds)], []
    writer = _Writer(len(kinds))
    writer.write(of_layers, (BEFORE, -1), -1)
    for number, position in kinds:
        writer.write(of_layers, (LAYER, position), number)
    writer.write(of_loss, (LOSS, -1), -1)
    for number, position in reversed(kinds):
        writer.write(of_layers, (BACKWARD, position), number)
        ends.append(len(writer.requests.events))
    writer.let_all_go()
    return writer.requests, ends, writer.first_product
