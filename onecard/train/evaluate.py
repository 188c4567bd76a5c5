"""The loss on held-out rows, computed exactly as in training, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onecard.data.batches import micro_batches, share_for_rank
from onecard.data.packing import padded_tokens
from onecard.errors import ModelError
from onecard.objectives.base import Objective
from onecard.train.oom import SMALLEST_CHUNK, MicroBatchLimits, give_back_memory, is_out_of_memory

MAX_FAILURES = 3  # of one row, at a chunk of logits that cannot be made smaller
TOO_LONG = "a single held-out row does not fit in memory; use a shorter --cutoff_len, or --test_size 0"


@dataclass
class EvaluationLimits:
    """What has been found not to fit in evaluation, so that it is not tried again; each process finds its own."""

    too_many_tokens: float = math.inf
    """Of a micro-batch, padding included."""
    loss_chunk: int = 0
    """Supervised tokens whose logits did fit; 0: as in training."""
    every_turn: bool = False
    """Each process has to run as many micro-batches as the others, so nothing can be tried twice."""


def evaluation_sums(
    model: torch.nn.Module,
    samples: Sequence[Any],
    accelerator: Any,
    *,
    objective: Objective,
    limits: MicroBatchLimits | None = None,
    evaluation_limits: EvaluationLimits | None = None,
    on_change: Callable[[str], None] = lambda change: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """The objective's sums over `samples`: loss, units, metrics flat, float64 (2 + 2 n_metrics,), on every process.

    Args:
        model: any causal LM, wrapped or not; it is put back into training mode if it was in it.
        samples: held-out ones; accelerator: moves the batches and sums over processes.
        limits: as in training; evaluation_limits: what did not fit before, and now.
        on_change: is given words each time that memory ran out.
        progress: is given how many of this process's rows are done, and how many there are.

    Raises ModelError when a single row does not fit.
    """
    objective = with_estimate(objective, model, samples, accelerator, limits=limits,
                              evaluation_limits=evaluation_limits, on_change=on_change)  # fmt: skip
    was_training, limits = model.training, limits or MicroBatchLimits()
    model.eval()
    lengths = objective.lengths(samples)
    micros = micro_batches(np.arange(len(samples)), lengths, **limits.cut)
    row_tokens = limits.row_tokens
    mine = share_for_rank(micros, accelerator.process_index, accelerator.num_processes, lengths, row_tokens)
    waiting = [micro for micro in mine if micro is not None]
    total = torch.zeros(2 + 2 * len(objective.metrics), dtype=torch.float64)
    own, n_failures, n_done, n_mine = evaluation_limits or EvaluationLimits(), 0, 0, sum(map(len, waiting))
    n_more = (len(mine) - len(waiting)) * own.every_turn
    loss_chunk = min(own.loss_chunk or limits.loss_chunk, limits.loss_chunk or own.loss_chunk)
    while waiting:
        micro = waiting.pop(0)
        half = len(micro) // 2
        if half and padded_tokens(micro, lengths, row_tokens) >= own.too_many_tokens:
            waiting[:0] = [micro[:half], micro[half:]]
            continue
        found = _sums_of(objective, [samples[i] for i in micro], model, accelerator.device, loss_chunk, row_tokens)
        if found is not None:
            total, n_failures, n_done = total + found, 0, n_done + len(micro)
            progress(n_done, n_mine)
            continue
        if own.every_turn:
            raise ModelError(TOO_LONG)
        give_back_memory()
        waiting.insert(0, micro)
        if half:
            own.too_many_tokens = padded_tokens(micro, lengths, row_tokens)
            on_change(f"fewer than {own.too_many_tokens:,} tokens at once")
            continue
        most = min(loss_chunk or int(lengths[micro[0]]), int(lengths[micro[0]]))
        n_failures += most // 2 < SMALLEST_CHUNK
        if n_failures > MAX_FAILURES:
            raise ModelError(TOO_LONG)
        if most // 2 < SMALLEST_CHUNK:
            on_change("the same once more")
            continue
        loss_chunk = own.loss_chunk = most // 2
        on_change(f"logits of {loss_chunk} tokens at once")
    for _ in range(n_more):  # of no weight
        _sums_of(objective, samples[:1], model, accelerator.device, loss_chunk)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    model.train(was_training)
    return total.cpu()


def with_estimate(
    objective: Objective, model: torch.nn.Module, samples: Sequence[Any], accelerator: Any, **how: Any
) -> Objective:
    """The objective with what it has to know of all these samples; how: as for `evaluation_sums`."""
    asked = objective.estimator(samples)
    if asked is None:
        return objective
    loss, n_units = evaluation_sums(model, asked[1], accelerator, objective=asked[0], **how)[:2].tolist()
    return objective.with_estimate(loss / n_units)


def _sums_of(
    objective: Objective, samples: Sequence[Any], model: torch.nn.Module, device: Any, loss_chunk: int, row_tokens: int
) -> torch.Tensor | None:
    """As `evaluation_sums`, of one micro-batch; None when memory ran out."""
    try:
        with torch.no_grad():
            cut = {"chunk_tokens": loss_chunk, "row_tokens": row_tokens}
            loss, n_units, metrics = objective.sums_of(model, samples, device, **cut)
            return torch.tensor([float(loss), n_units, *metrics.flatten().tolist()], dtype=torch.float64)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
    return None
