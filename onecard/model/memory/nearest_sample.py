"""About what a micro-batch takes, at once: from traces that are there already, of other settings.

A trace takes tenths of a second, and a plan asks for up to thirty. What the layers of one model take is much the same
at another rank or number of bits, and goes with the tokens; so until the traces of a setting are made, those of the
nearest one stand for them. Knows traces; weights, adapter and optimizer are `estimate.py`'s and need none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from onecard.model.memory.extrapolate import KNOWN_ALONE, NotTraced, Sample, sample, traced, traced_setups
from onecard.model.memory.simulate import Part

SIZES = ("rows", "length", "loss_chunk", "mlp_tile")  # that traces are extended over
WHOLE_CHUNKS = 4  # of the loss in a row: those of longer rows take as much, one after the other
_stood_for: ContextVar[list[bool] | None] = ContextVar("_stood_for", default=None)


@contextmanager
def known_traces_alone() -> Iterator[list[bool]]:
    """Within it nothing is traced. Yields whether there was another trace, for each that is missing."""
    found: list[bool] = []
    alone, noted = KNOWN_ALONE.set(True), _stood_for.set(found)
    try:
        yield found
    finally:
        KNOWN_ALONE.reset(alone)
        _stood_for.reset(noted)


def sample_or_nearest(model: Any, setup: Any, part: Part) -> Sample:
    """`extrapolate.sample`; within `known_traces_alone` that of the nearest setting which is known.

    Raises NotTraced where nothing of this model is.
    """
    stood_for = _stood_for.get()
    if stood_for is None:
        return sample(model, setup, part)
    try:
        return sample(model, setup, part)
    except NotTraced:
        found = _nearest(model, setup, part)
    stood_for.append(found is not None)
    if found is None:
        raise NotTraced
    return found


def _nearest(model: Any, setup: Any, part: Part) -> Sample | None:
    known = traced_setups(model, part)
    settings = {replace(each, **dict.fromkeys(SIZES, 1)): None for each in known}  # in the order of `known`
    for each in sorted(settings, key=partial(_distance, setup)):
        for sizes in _sizes(setup, part):
            try:
                found = sample(model, replace(each, **sizes), part)
            except NotTraced:
                continue
            return _adjusted(found, setup, each, 1.0)
    for each in sorted(known, key=lambda each: (*_distance(setup, each), abs(each.tokens - setup.tokens))):
        try:
            found = traced(model, each, part)
        except NotTraced:  # it was let go
            continue
        return _adjusted(found, setup, each, setup.tokens / each.tokens)
    return None


def _sizes(setup: Any, part: Part) -> Iterator[dict[str, int]]:
    """The sizes of `setup`, and others that take about as much, or more."""
    for n_rows, length in {setup.rows: setup.length, 2: -(-setup.tokens // 2), 1: setup.tokens}.items():
        sizes = {"rows": n_rows, "length": length, "loss_chunk": setup.loss_chunk, "mlp_tile": setup.mlp_tile}
        yield sizes
        if part is not Part.LOSS and setup.mlp_tile:
            yield {**sizes, "mlp_tile": 0}
        if part is Part.LOSS and 1 < setup.loss_chunk < n_rows * length:  # logits of a chunk are most of it
            yield {**sizes, "length": WHOLE_CHUNKS * setup.loss_chunk // n_rows}


def _distance(setup: Any, known: Any) -> tuple[float, ...]:
    """How much another setting changes what a micro-batch takes, what changes most first."""
    differ = {each.name for each in fields(setup) if getattr(setup, each.name) != getattr(known, each.name)}
    first = [float(name in differ) for name in ("gradient_checkpointing", "offload_activations", "element_bytes")]
    ranks = abs(math.log(max(1, setup.rank) / max(1, known.rank)))
    return (*first, float(len(differ.difference(SIZES))), abs(setup.bits - known.bits), ranks)


def _adjusted(found: Sample, setup: Any, known: Any, factor: float) -> Sample:
    """The sample of `known` for so many times its tokens, with the arithmetic and the layer inputs of `setup`."""
    factor *= setup.element_bytes / known.element_bytes
    found = replace(found, live=found.live * factor, kept=found.kept * factor, entry=found.entry * factor,
                    sizes=found.sizes * factor, blocks=found.blocks * factor)  # fmt: skip
    if setup.offload_activations and not known.offload_activations:
        trace = replace(found.trace, sent=[(position, 0) for position in range(len(found.kept))])
        found = replace(found, trace=trace, sizes=found.kept, kept=np.zeros(len(found.kept)))
    return found
