"""What is alive in a micro-batch of any size, from memory traces at a few small sizes.

Each operation of `simulate.py` holds a number of bytes that is a polynomial of low degree in the length of a row and
the size of a piece (chunk of the loss, tile of the MLPs), as long as the same operations run. So a few sizes are traced
of each stretch in which the techniques act alike, and every other size follows from them. They are the same small sizes
for all that is asked, so that a plan, which asks for many, traces few.

The layers and the loss are traced apart: tokens of a chunk and bits of the head change nothing in the layers, and
tiles nothing in the loss. Knows an `Architecture` and a `MemoryConfig`; does not know which moment is the worst.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch.overrides import TorchFunctionMode

from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.chunked_loss import CHUNK_BYTES_PER_LOGIT, ROWS_AT_ONCE
from onecard.model.memory import fake_model
from onecard.model.memory.gives_way import GIVES_WAY, GaveWay
from onecard.model.memory.simulate import LOSS, WHOLE_STEP, MemoryTrace, Part, TooManyOperations, run
from onecard.model.memory_saving.activation_offload import MIN_BYTES

SHORT_ROWS, SHORT_CHUNK = (24, 48), 4  # for models that go through their tokens one by one
LOOPS = (2, 3, 4)  # operations
LENGTHS = (64, 256, 1024)  # whole tiles and chunks of most kernels; two neighbours are traced
UNBOUNDED = 2**40  # tokens of a chunk that holds all
# Whether plans for many ranks and numbers of rows will be asked for, as by a slider: then they are traced at two each.
ASKS_FOR_MANY: ContextVar[bool] = ContextVar("ASKS_FOR_MANY", default=False)
RANKS, ROWS = (8, 64), (2, 4)


@dataclass(frozen=True)
class Sample:
    """A trace at one size, or what follows from several for another one."""

    trace: MemoryTrace
    live: np.ndarray
    kept: np.ndarray
    entry: float
    sizes: np.ndarray
    blocks: np.ndarray
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


def sample(model: Any, setup: Any, part: Part = WHOLE_STEP) -> Sample:
    """A micro-batch of `setup`, or the part of it that is asked for.

    Raises ModelError: the model cannot run on fake tensors; TooManyOperations.
    """
    setup = relevant(model, setup, part)
    try:
        return _over_ranks(model, setup, part) if ASKS_FOR_MANY.get() else extrapolated(model, setup, part)
    except TooManyOperations:
        return _from_short_rows(model, setup, part)


def sample_at_size(model: Any, setup: Any, part: Part) -> Sample:
    """As `sample`, traced at its own size, where other requests are made than at smaller ones."""
    return traced(model, relevant(model, setup, part), part)


def relevant(model: Any, setup: Any, part: Part) -> Any:
    """The setup without what changes nothing in this part at this size, so that equal ones are traced once."""
    setup = replace(
        setup, optimizer="adamw", offload_embeddings=False, stream_layers=False, n_cards=1, only_vocabulary=False,
        expandable_segments=True,
    )  # fmt: skip
    if setup.mlp_tile >= setup.tokens or part is Part.LOSS:
        setup = replace(setup, mlp_tile=0)
    if setup.loss_chunk >= setup.tokens:
        setup = replace(setup, loss_chunk=UNBOUNDED)
    if part is Part.LAYERS and setup.loss_chunk:
        setup = replace(setup, loss_chunk=1, head_bits=16)
    elif part is Part.LOSS:
        may_recompute = model.checkpoints and LoraOptions(setup.peft_method).may_recompute
        setup = replace(setup, gradient_checkpointing=may_recompute)
        if may_recompute and _adapts_layers_alone(setup):  # of them only their inputs are kept
            setup = replace(setup, rank=RANKS[0], bits=16 if setup.head_bits == 16 else setup.bits)
        if setup.tokens <= model.max_positions or not model.max_positions:  # else as many may not fit into a row
            setup = replace(setup, rows=1, length=setup.tokens)
    if setup.offload_activations and setup.tokens <= min(_offload_limits(model, setup)):
        setup = replace(setup, offload_activations=False)
    return setup


def _adapts_layers_alone(setup: Any) -> bool:
    """Whether what is trained is LoRA of the layers, so that the loss is the same for every rank."""
    is_plain = setup.peft_method == "lora" and setup.targets == "all-linear" and not setup.use_dora
    return is_plain and not (setup.expert_targets or setup.train_embeddings or setup.n_new_tokens)


def _offload_limits(model: Any, setup: Any) -> list[int]:
    """Tokens of which hidden states stay on the card, in fp32 and as layers take them, and one fp32 number of each."""
    return [-(-MIN_BYTES // width) - 1 for width in (4 * model.hidden_size, setup.element_bytes * model.hidden_size, 4)]


def extrapolated(model: Any, setup: Any, part: Part) -> Sample:
    """As `sample`, of a model that takes its tokens all at once; traced at its own size where no other will do."""
    windows = {*(() if part is Part.LOSS else model.source.windows),
               *(_offload_limits(model, setup) if setup.offload_activations else ())}  # fmt: skip
    asked_often = setup.rows == 1 or (ASKS_FOR_MANY.get() and not _pieces(setup))  # a plan asks for many of one row
    lengths = _lengths(setup.length, sorted(windows)) if asked_often else None
    if lengths is not None and part is not Part.LOSS and len({_row_pieces(length) for length in lengths}) > 1:
        lengths = _lengths(setup.length, sorted(windows | {ROWS_AT_ONCE, 2 * ROWS_AT_ONCE}))
    if lengths is None:
        return traced(model, setup, part)
    for n_sides in (2, 3):  # of a polynomial of first and second degree in the length
        points, terms = _design(setup, lengths, n_sides)
        found = [traced(model, point, part) for point in points]
        if _differ(found):
            return traced(model, setup, part)
        if not _is_quadratic(found[0], found[1], lengths):
            break
    return _combined(found, points, setup, terms)


def _row_pieces(length: int) -> int:
    """Pieces of a gradient of one row while it is scaled; of three or more as many are traced."""
    return min(3, -(-length // ROWS_AT_ONCE))


def _over_ranks(model: Any, setup: Any, part: Part) -> Sample:
    """As `extrapolated`; LoRA of another rank than these two is between them or beyond: the bytes are affine in it."""
    if setup.rank in RANKS or setup.peft_method != "lora":
        return _over_rows(model, setup, part)
    return _on_line(model, setup, part, "rank", RANKS, _over_rows)


def _over_rows(model: Any, setup: Any, part: Part) -> Sample:
    """As `extrapolated`; the bytes of several rows are affine in their number, too, where nothing goes in pieces."""
    if setup.rows == 1 or _pieces(setup):
        return extrapolated(model, setup, part)
    return _on_line(model, setup, part, "rows", ROWS, extrapolated)


def _on_line(
    model: Any, setup: Any, part: Part, name: str, anchors: tuple[int, int], sample_at: Callable[..., Sample]
) -> Sample:
    """The value at `setup` of the line through the samples at two values of one of its numbers."""
    points = [replace(setup, **{name: anchor}) for anchor in anchors]
    found = [sample_at(model, point, part) for point in points]
    if _differ(found):
        return sample_at(model, setup, part)
    return _combined(found, points, setup, lambda at: [1.0, float(getattr(at, name))])


def _lengths(length: int, windows: list[int]) -> list[int] | None:
    """Two lengths in the stretch between two windows in which `length` lies; None where it is too short for two.

    windows: lengths beyond which other operations run.
    """
    place = bisect_left(windows, length)
    low = windows[place - 1] if place else 0
    high = windows[place] if place < len(windows) else math.inf
    upper = next((one for one in LENGTHS[1:] if length <= one), LENGTHS[-1])
    lower = upper // 4
    if lower <= low:
        lower = math.ceil(1.5 * low)
        upper = 2 * lower
    if upper > high:
        lower, upper = int(low + max(1, (high - low) // 3)), int(high)
    return [lower, upper] if lower < upper else None


def _pieces(setup: Any) -> list[str]:
    """What goes in pieces of some tokens: the loss, the MLPs."""
    return [name for name in ("loss_chunk", "mlp_tile") if 1 < getattr(setup, name) < UNBOUNDED]


Terms = Callable[[Any], list[float]]


def _design(setup: Any, lengths: list[int], n_sides: int) -> tuple[list[Any], Terms]:
    """As many sizes to trace as the polynomial has terms, and the terms; the first two differ in length alone."""
    pieces = _pieces(setup)

    def terms(at: Any) -> list[float]:
        powers = [float(at.length) ** degree for degree in range(n_sides)]
        return [*powers, *(float(getattr(at, name)) for name in pieces)]

    shares = {name: _shares(getattr(setup, name), setup.tokens) for name in pieces}
    points = []
    for length in [*lengths, sum(lengths) // 2][:n_sides]:
        of_pieces = {name: max(1, int(share * length)) for name, (share, _) in shares.items()}
        points.append(replace(setup, length=length, **of_pieces))
    points += [replace(points[1], **{name: int(other * points[1].length)}) for name, (_, other) in shares.items()]
    return points, terms


def _shares(piece: int, n_tokens: int) -> tuple[float, float]:
    """Two sizes of a piece, as shares of the tokens, of which as many pieces are different ones: two, or more."""
    return (0.625, 0.75) if n_tokens <= 2 * piece else (0.25, 0.125)


def _combined(found: list[Sample], points: list[Any], setup: Any, terms: Terms) -> Sample:
    """The value at `setup` of the polynomial through all samples."""
    rows = np.array([terms(point) for point in points])
    scale = np.abs(rows).max(axis=0)
    weights = np.linalg.solve((rows / scale).T, np.array(terms(setup)) / scale)
    same_requests = all(each.trace.events == found[-1].trace.events for each in found)
    values: dict[str, Any] = {
        key: sum(weight * getattr(each, key) for weight, each in zip(weights, found, strict=True))
        for key in ("live", "kept", "entry", "sizes", *(["blocks"] if same_requests else []))
    }
    if same_requests:
        return replace(found[-1], **values)
    return replace(found[-1], trace=replace(found[-1].trace, events=[]), blocks=np.zeros(0), **values)


def _differ(found: list[Sample]) -> bool:
    """Whether other operations ran, or other tensors went to RAM."""
    first, *others = found
    sent = [layer for layer, _ in first.trace.sent]
    return any(
        first.trace.names != other.trace.names or sent != [layer for layer, _ in other.trace.sent] for other in others
    )


def _is_quadratic(one: Sample, other: Sample, lengths: list[int]) -> bool:
    """Whether some tensor grows with the square."""
    first, second = np.array(one.trace.sizes), np.array(other.trace.sizes)
    return bool((second > 1.02 * first * lengths[1] / lengths[0] + 4096).any())


def _from_short_rows(model: Any, setup: Any, part: Part) -> Sample:
    """Of a model whose operations are as many as its tokens: from short rows, by the worst moment of each phase.

    They have as many chunks of the loss as long ones, smaller ones; the logits that are missing are added. MLPs in
    tiles and layer inputs in RAM are left out of account, so that it is an estimate from above.
    """
    chunk = min(setup.loss_chunk, SHORT_CHUNK)
    short = replace(setup, loss_chunk=chunk, mlp_tile=0, offload_activations=False)
    points = [replace(short, length=length) for length in SHORT_ROWS]
    found = [_peak_by_phase(traced(model, point, part)) for point in points]
    found_at = _combined(found, points, setup, lambda at: [1.0, float(at.length)])
    n_rows = max(0, min(setup.loss_chunk, setup.tokens) - chunk)
    logits = n_rows * model.vocab_size * CHUNK_BYTES_PER_LOGIT[8 * setup.element_bytes]
    return replace(found_at, live=found_at.live + logits * (np.array(found_at.trace.phase) == LOSS))


def _peak_by_phase(found: Sample) -> Sample:
    """The worst moment of each phase of each layer alone."""
    places = [*zip(found.trace.phase, found.trace.layer, strict=True)]
    worst: dict[tuple[int, int], float] = {}
    for place, live in zip(places, found.live, strict=True):
        worst[place] = max(worst.get(place, 0.0), float(live))
    trace = replace(
        found.trace, phase=[phase for phase, _ in worst], layer=[layer for _, layer in worst], blocks=[], events=[]
    )
    return replace(found, trace=trace, live=np.array([*worst.values()]))


# How to build a model, the most exact first: some models count on all of their layers, or on a mask.
BUILD_OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"unpacked": False},
    {"whole": True},
    {"whole": True, "unpacked": False},
)
_working_options: dict[Any, dict[str, bool]] = {}
_failed: dict[Any, str] = {}


class NotTraced(Exception):
    """A size that no trace is known of, where nothing may be traced."""


# Whether only traces that are there may be used, for an answer at once.
KNOWN_ALONE: ContextVar[bool] = ContextVar("KNOWN_ALONE", default=False)
_traced_setups: dict[tuple[Any, Part], dict[Any, None]] = {}


def traced_setups(model: Any, part: Part) -> list[Any]:
    """The setups of which there are, or were, traces, as `sample` asks for them; the newest last."""
    return [*_traced_setups.get((model, part), {})]


@lru_cache(maxsize=512)
def traced(model: Any, setup: Any, part: Part = WHOLE_STEP) -> Sample:
    """A micro-batch that runs on fake tensors. Raises ModelError, TooManyOperations, NotTraced."""
    apart = replace(setup, rows=1, length=1, loss_chunk=0, mlp_tile=0, offload_activations=False)
    if setup.bits != 8:  # of which a model that can compute its layers again is another one: see `checkpoint_layers`
        apart = replace(apart, bits=min(16, setup.bits), gradient_checkpointing=model.checkpoints)
    key = (model, apart)
    if key in _failed:  # one failure stands for all sizes: a plan asks for many
        raise ModelError(_failed[key])
    if KNOWN_ALONE.get():
        raise NotTraced
    if GIVES_WAY.get()():
        raise GaveWay
    reasons: list[Exception] = []
    for options in [_working_options[key]] if key in _working_options else BUILD_OPTIONS:
        try:
            built = _built(model, apart, *options.items())
            trace = _without_loops(run(built, setup, part))
        except TooManyOperations:
            _working_options[key] = options
            raise
        except Exception as reason:  # whatever a model's own code does not expect of tensors without values
            reasons.append(reason)
            continue
        _working_options[key] = options
        if part is Part.LOSS:
            trace = _picked(trace, [number for number, phase in enumerate(trace.phase) if phase == LOSS])
        _traced_setups.setdefault((model, part), {})[setup] = None
        kept = np.array(trace.kept, dtype=float)
        sizes = np.array([size for _, size in trace.sent], dtype=float)
        blocks = np.array(trace.blocks, dtype=float)
        return Sample(trace, np.array(trace.live, dtype=float), kept, float(trace.entry), sizes, blocks, built.kinds)
    _failed[key] = str(reasons[0]) or type(reasons[0]).__name__
    raise ModelError(_failed[key]) from reasons[0]


def _without_loops(trace: MemoryTrace) -> MemoryTrace:
    """The trace with each loop of a few operations, such as over pieces of a tensor, as one round of them."""
    every = [*zip(trace.names, trace.phase, trace.layer, trace.live, trace.sizes, strict=True)]
    kept: list[tuple[str, int, int, int, int]] = []
    for one in every:
        kept.append(one)
        for n in LOOPS:
            if len(kept) < 2 * n or kept[-1][0] != kept[-1 - n][0]:  # most by far, and cheap to tell
                continue
            if [k[:3] for k in kept[-n:]] == [k[:3] for k in kept[-2 * n : -n]]:
                again = [kept.pop() for _ in range(n)][::-1]
                rounds = zip(kept[-n:], again, strict=True)
                kept[-n:] = [(*a[:3], max(a[3], b[3]), max(a[4], b[4])) for a, b in rounds]
                break
    names, phase, layer, live, sizes = (list(column) for column in zip(*kept, strict=True))
    return replace(trace, names=names, phase=phase, layer=layer, live=live, sizes=sizes)


def _picked(trace: MemoryTrace, places: list[int]) -> MemoryTrace:
    """Only some operations of a trace."""
    columns: dict[str, Any] = {name: [getattr(trace, name)[place] for place in places]
                               for name in ("names", "phase", "layer", "live", "sizes")}  # fmt: skip
    return replace(trace, **columns)


@lru_cache(maxsize=4)
def _built(model: Any, setup: Any, *options: tuple[str, bool]) -> Any:
    config, own_code = model.source.read()
    # Without anybody to give way to, no call need pass through a mode.
    asks: Any = nullcontext() if GIVES_WAY.get() is bool else _GivesWay()
    with asks:
        return fake_model.build(config, setup, **dict(options), **own_code)


class _GivesWay(TorchFunctionMode):
    """Asks before each call of torch, of which a model that is built makes hundreds, whether to give way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if GIVES_WAY.get()():
            raise GaveWay
        return func(*args, **(kwargs or {}))
