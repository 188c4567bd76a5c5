"""The peak memory of a micro-batch of the whole model, from the memory traces of a few of its layers.

What is alive at an operation grows by what all layers before it keep; `extrapolate.py` gives the rest at any size.
Knows an `Architecture` and a `MemoryConfig`; adds no weights or optimizer state.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from onecard.config.lora import LoraOptions
from onecard.console import warn
from onecard.model.chunked_loss import CHUNK_BYTES_PER_LOGIT
from onecard.model.memory.extrapolate import ASKS_FOR_MANY, KNOWN_ALONE, NotTraced, Sample, relevant
from onecard.model.memory.nearest_sample import sample_or_nearest
from onecard.model.memory.simulate import BACKWARD, LAYER, LOSS, Part, TooManyOperations

# Families whose plan is more than 3 % from what a small model of it takes: planned over measured. With some
# of them experts or loops depend on values, which a model without weights lacks; of the others the cause is open.
SEEN_RATIO = {
    "biogpt": 1.11, "dbrx": 1.11, "doge": 0.938, "got_ocr2": 1.14, "inkling2_text": 1.37, "jetmoe": 2.18,
    "longcat_flash": 1.09, "minicpm3": 0.958, "qwen4_exp": 1.61, "qwen4_exp_text": 1.61, "rwkv": 1.38, "xglm": 1.16,
    "youtu": 0.957, "zamba": 0.29,
}  # fmt: skip


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
    if model.model_type in SEEN_RATIO:
        ratio = f"{SEEN_RATIO[model.model_type]:.0%}"
        _warn_once(f"{model.name}: the plan of a small {model.model_type} was {ratio} of what it took")
    try:
        if KNOWN_ALONE.get():  # of the traces that are there now
            return _simulated_peak(model, setup)
        return _cached_peak(nameless(model), relevant(model, setup, Part.WHOLE), ASKS_FOR_MANY.get())
    except NotTraced:  # an answer at once, of a model that is not known yet
        pass
    except TooManyOperations:
        _warn_once(f"{model.name} ({model.model_type}) goes through its tokens in too many operations")
    except Exception as reason:  # a plan that cannot be made must not stop a training run
        lines = [line for line in str(reason).splitlines() if line.strip()] or [type(reason).__name__]
        _warn_once(f"the memory of {model.name} ({model.model_type}) cannot be planned: {lines[0]}")
    return _rough_estimate(model, setup)


@contextmanager
def isolated() -> Iterator[None]:
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


@lru_cache(maxsize=64)
def nameless(model: Any) -> Any:
    """Equal models share their traces under any name."""
    return replace(model, name="", notes=(), source=replace(model.source, name=""))


def samples_of_step(model: Any, setup: Any) -> list[Sample]:
    """The layers of a micro-batch and its loss, or all of it where they are not told apart.

    Raises NotTraced, and whatever a model's own code raises on fake tensors.
    """
    model = nameless(model)
    layers = sample_or_nearest(model, setup, Part.LAYERS if setup.loss_chunk else Part.WHOLE)
    if not setup.loss_chunk:
        return [layers]
    if not layers.kinds:
        return [sample_or_nearest(model, setup, Part.WHOLE)]
    return [layers, sample_or_nearest(model, setup, Part.LOSS)]


def _simulated_peak(model: Any, setup: Any) -> ActivationPeak:
    with isolated():
        found = samples_of_step(model, setup)
    apart = len(found) > 1
    n_trained = LoraOptions(setup.peft_method).n_last_layers
    moments = [_of_whole_model(each, found[0], n_trained) for each in found]
    total, inputs, phase = (np.concatenate(column) for column in zip(*moments, strict=True))
    if apart:
        total[: len(found[0].live)][np.array(found[0].trace.phase) == LOSS] = 0
        total[len(found[0].live) :][np.array(found[1].trace.phase) != LOSS] = 0
    worst = int(total.argmax())
    batch = max(0, round(found[0].entry - setup.tokens * model.hidden_size * setup.element_bytes))
    kept = min(round(inputs[worst]), round(total[worst]))
    return ActivationPeak(kept, round(total[worst]) - kept, batch, int(phase[worst]), found[0].sent())


@lru_cache(maxsize=2048)
def _cached_peak(model: Any, setup: Any, _asks_for_many: bool) -> ActivationPeak:
    return _simulated_peak(model, setup)


def _of_whole_model(found: Sample, layers: Sample, n_trained: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At each operation: bytes alive with all layers there, those of them that layers keep, and the phase."""
    before, whole = layers.kept_before(n_trained)
    traced = np.concatenate([[0.0], np.cumsum(found.kept)])
    entry = layers.entry - found.entry  # masks and the like, which are of other sizes where the loss is traced apart
    extra, inputs = np.zeros(len(found.live)), np.zeros(len(found.live))
    phase, layer = np.array(found.trace.phase), np.array(found.trace.layer)
    for position in range(len(found.kept) if found.kinds else 0):
        here = (layer == position) & ((phase == LAYER) | (phase == BACKWARD))
        extra[here] = before[position] - traced[position]
        inputs[here] = before[position]
    at_loss = (phase == LOSS) & bool(found.kinds)
    extra[at_loss], inputs[at_loss] = whole - traced[-1] + entry, whole
    return found.live + extra, inputs, phase


def warn_again() -> None:
    """Let the next plan say what it warns of, also where another one has said it before."""
    _warn_once.cache_clear()


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
