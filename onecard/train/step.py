"""One optimizer step: its samples in micro-batches, the gradients, the clipping, the update.

The loss of a step is per unit (for most objectives: supervised token) of the whole step, whatever the cut and the
number of processes. When memory runs out, the gradients are forgotten, the limits are made smaller (`oom.py`) and the
step is done again. Knows a `Run`; does not know schedules of saving and evaluating, which are `loop.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from onecard.data.batches import by_source, micro_batches, share_for_rank, step_samples
from onecard.errors import ModelError, OneCardError
from onecard.installation import command
from onecard.model.hardware import free_and_total_bytes, peak_reserved_bytes
from onecard.model.load import checkpoint_layers
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.tiled_mlp import tile_mlps
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.model.trained import base_of
from onecard.objectives.base import Objective
from onecard.train.evaluate import Evaluator
from onecard.train.not_finite import explain
from onecard.train.oom import MicroBatchLimits, smaller
from onecard.train.optim import set_learning_rate
from onecard.train.run import Run, RunEvent
from onecard.train.state import seed_step
from onecard.train.trackers import ANCHOR

MAX_FAILURES = 3  # of one step, at limits that cannot be made smaller
SMALLER_HINT = (
    f"use a shorter --cutoff_len, fewer --bits, --head_bits 4 or a smaller --lora_r; {command('plan')} shows what "
    "each gives. What was saved stays whole"
)


class StepRequests(NamedTuple):
    """What is to be done at the end of a step."""

    stop: bool = False
    evaluate: bool = False
    save: bool = False
    control: bool = False
    """Something was asked through the control folder."""


class NotFinite(OneCardError):
    """A step whose loss or gradient is NaN or Inf; it was not taken."""


@dataclass(frozen=True)
class GradientAttempt:
    """What came of gathering a step's gradients; they count for nothing where memory ran out."""

    losses: list[float]
    """Of each source, divided by the units of the whole step: their sum is the step's loss."""
    metrics: list[float]
    """The sums of the objective's metrics, flat."""
    grad_norm: float
    requests: StepRequests
    out_of_memory: bool


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    skipped: bool
    requests: StepRequests
    """Those of all processes."""
    by_source: np.ndarray
    """(n_sources, 3): the summed loss, the units and the tokens of each source."""
    metrics: dict[str, float]
    """The objective's, over the whole step."""


def take_step(run: Run, requested: Callable[[], StepRequests] = StepRequests) -> StepResult:
    """One optimizer step over the samples that (seed, step) names, whatever the number of processes.

    requested: what this process wants done at its end. The loss is the sum over all micro-batches of all processes,
    divided by the units of the whole step, which the objective counts: supervised tokens, for most.
    For samples with 3 and 5 answer tokens it is (sum of 8 losses) / 8, whether they pass together or one by one.
    """
    options = run.options
    chosen = step_samples(run.state.step, run.train_samples.order, options.total_batch, options.seed)
    data, indices = run.samples_of_step(chosen.indices)
    # Before the clipping, with which DeepSpeed takes the step.
    learning_rate = set_learning_rate(run.optimizer, options, run.state.step, run.state.total_steps)
    for _ in range(run.options.updates_per_step):
        attempt = _gather_gradients(run, data, indices, requested)
        while attempt.out_of_memory:
            make_room(run, data.lengths[indices])
            attempt = _gather_gradients(run, data, indices, requested)
        run.n_failures = 0
        loss, norm = sum(attempt.losses), attempt.grad_norm
        if not math.isfinite(loss):
            raise NotFinite(explain(run, chosen.indices, f"the loss is {loss}"))
        if not math.isfinite(norm) and not run.engine.has_scaler:
            raise NotFinite(explain(run, chosen.indices, f"the gradient norm is {norm}"))
        skipped = _apply(run, is_finite=math.isfinite(norm))
    # A checkpoint holds the rate of the step that follows, whether that one was tried before it was written or not.
    set_learning_rate(run.optimizer, options, run.state.step + 1, run.state.total_steps)
    tokens = int(data.lengths[indices].sum())
    by_source = _of_sources(data, indices, attempt.losses)
    metrics = run.objective.means(attempt.metrics)
    if run.anchor is not None:
        metrics[ANCHOR] = run.anchor.last_kl
    return StepResult(loss, norm, tokens, learning_rate, skipped, attempt.requests, by_source, metrics)


def _gather_gradients(
    run: Run, data: Any, indices: np.ndarray, requested: Callable[[], StepRequests]
) -> GradientAttempt:
    """Forward and backward of a step's samples in micro-batches, and the clipping; the same however they are cut.

    Done again after a failure it draws the same random numbers, so it is the same step.
    """
    accelerator = run.accelerator
    n_units = data.units[indices].sum().item()
    micros = micro_batches(indices, data.lengths, **run.limits.cut)
    if data.parts is not None:
        micros = by_source(micros, data.parts)
    ranks = accelerator.process_index, accelerator.num_processes
    mine = share_for_rank(micros, *ranks, data.lengths, run.limits.row_tokens)
    objective = _estimated(run, data, indices) if run.objective.looks_ahead else run.objective
    seed_step(run.options.seed, run.state.step, accelerator.process_index)
    own_sums, failure = accumulate(run, data, mine, n_units, objective)
    sums, requests, out_of_memory = _agree(accelerator, own_sums, requested(), failure)
    n_sources = len(sums) - 2 * len(run.objective.metrics)
    losses, metrics = sums[:n_sources], sums[n_sources:]
    if out_of_memory or not math.isfinite(sum(losses)):
        return GradientAttempt(losses, metrics, math.nan, requests, out_of_memory)
    try:
        return GradientAttempt(losses, metrics, run.engine.clip(), requests, False)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        if accelerator.num_processes > 1 or not run.engine.can_repeat:
            place = f"out of memory at step {run.state.step + 1} while the gradients were put together"
            raise ModelError(f"{place}, which several processes cannot repeat; {SMALLER_HINT}") from reason
    return GradientAttempt(losses, metrics, math.nan, requests, True)


def _estimated(run: Run, data: Any, indices: np.ndarray) -> Objective:
    """The objective with what it has to know of the whole step, which is found without gradients."""

    def on_change(change: str) -> None:
        message = f"step {run.state.step + 1}: out of memory; {change}. The result does not change."
        run.events.append(RunEvent({"step": run.state.step + 1, "event": "out_of_memory", "change": change}, message))

    evaluator = Evaluator(run.model, run.accelerator, run.limits, run.evaluation_limits, on_change)
    return evaluator.estimated(run.objective, [data[int(i)] for i in indices])


def _of_sources(data: Any, indices: np.ndarray, losses: Sequence[float]) -> np.ndarray:
    """(n_sources, 3): the summed loss, the units and the tokens of each source in a step."""
    parts = np.zeros(len(indices), int) if data.parts is None else data.parts[indices]
    units, tokens = (np.bincount(parts, held[indices], len(losses)) for held in (data.units, data.lengths))
    return np.stack([np.array(losses) * units.sum(), units, tokens], axis=1)


def _apply(run: Run, *, is_finite: bool) -> bool:
    """The optimizer's update; True when the fp16 scaler left it out. Half an update cannot be taken back."""
    try:
        if run.ranks is not None and is_finite:
            run.ranks.observe()
        skipped = run.engine.step()
        if run.ranks is not None and not skipped:
            run.ranks.allocate(run.state.step + 1, run.state.total_steps)
        return skipped
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        place = f"out of memory inside the optimizer at step {run.state.step + 1}, which cannot be done twice"
        raise ModelError(f"{place}: {_in_use(run)}; {SMALLER_HINT}, and the same command goes on from it") from reason


def accumulate(
    run: Run, data: Any, micros: Sequence[np.ndarray | None], n_units: float, objective: Objective | None = None
) -> tuple[torch.Tensor, bool]:
    """Add the gradients of micro-batches of these samples to those that are there; objective: the run's, unless given.

    Returns the loss of each source and the sums of the metrics (n_sources + 2 n_metrics,), and whether memory ran out
    on the way.
    """
    parts, n_sources = data.parts, max(1, len(run.train_samples.dataset.names))
    sums = torch.zeros(n_sources + 2 * len(run.objective.metrics))
    try:
        sums = sums.to(run.accelerator.device)
        for position, micro in enumerate(micros):
            is_last = position == len(micros) - 1
            if micro is None and not run.engine.needs_every_turn:
                continue
            with run.engine.gathering(is_last), run.offload or nullcontext():
                source = 0 if micro is None or parts is None else int(parts[micro[0]])
                loss, metrics = _backward(run, data, micro, n_units, is_last, objective or run.objective)
                sums[source] += loss
                sums[n_sources:] += metrics.flatten()
        if run.anchor is not None:
            run.anchor.add_gradients(run)
        if run.ranks is not None and run.accelerator.is_main_process:  # once in a step, however it is cut
            run.engine.backward(run.ranks.penalty(), True)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        if not run.engine.can_repeat:
            raise ModelError(
                f"out of memory, and processes that share weights cannot repeat a step; {SMALLER_HINT}"
            ) from reason
        return torch.zeros(len(sums)), True  # where there is room
    return sums, False


def make_room(run: Run, lengths: np.ndarray) -> None:
    """After memory ran out over samples of these lengths: forget the gradients and make the limits smaller.

    At the smallest limits the same is tried once more, since others may use the card, too. Raises ModelError then.
    """
    run.engine.forget()
    give_back_memory()
    recomputes = _is_checkpointed(run)
    can_offload = recomputes and (run.plan is None or run.plan.setup.n_cards == 1)
    found = smaller(run.limits, lengths, can_offload=can_offload, can_recompute=run.may_recompute and not recomputes)
    run.n_failures += found is None
    if found is None and run.n_failures > MAX_FAILURES:
        place = f"out of memory at step {run.state.step + 1} with nothing left to make smaller"
        raise ModelError(f"{place}: {_in_use(run)}; {SMALLER_HINT}")
    change = "the same once more" if found is None else found[1]
    if found is not None:
        use_limits(run, found[0])
    message = f"step {run.state.step + 1}: out of memory; {change}. The result does not change."
    run.events.append(RunEvent({"step": run.state.step + 1, "event": "out_of_memory", "change": change}, message))


def use_limits(run: Run, limits: MicroBatchLimits) -> None:
    """Let what the limits say take effect: recomputed layers, offload and tiles included."""
    if limits.recompute_layers and run.plan is not None and not _is_checkpointed(run):
        checkpoint_layers(base_of(run.plain_model), reentrant=run.plan.setup.bits == 8)
    if limits.offload_activations and run.offload is None:
        run.offload = ActivationOffload(run.plain_model, run.accelerator.device)
    if limits.mlp_tile != run.limits.mlp_tile:
        tile_mlps(run.plain_model, limits.mlp_tile)
    run.limits = limits


def _backward(
    run: Run, data: Any, micro: np.ndarray | None, n_units: float, is_last: bool, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of one micro-batch; its share of the step's loss, detached, and its sums of the metrics.

    `None` stands for a process that got fewer micro-batches than the others under DeepSpeed: it computes one with
    weight 0, because there every process has to take part in each exchange of gradients.
    """
    accelerator = run.accelerator
    samples = [data[int(i)] for i in (micro if micro is not None else [0])]
    cut = {"chunk_tokens": run.limits.loss_chunk, "row_tokens": run.limits.row_tokens}
    with accelerator.autocast():
        sums = objective.sums_of(run.model, samples, accelerator.device, **cut)
    if run.offload is not None:
        run.offload.turn_back()
    loss = sums.loss / (n_units or 1) * (micro is not None)
    run.engine.backward(loss, is_last)
    return loss.detach(), sums.metrics * (micro is not None)


def _agree(
    accelerator: Any, sums: torch.Tensor, requests: StepRequests, failed: bool
) -> tuple[list[float], StepRequests, bool]:
    """The step's sums over all processes, what any of them requests, and whether memory ran out: all do alike."""
    if accelerator.num_processes == 1:
        return sums.tolist(), requests, failed
    flags = [float(flag) for flag in (*requests, failed)]
    own = torch.tensor([*sums.tolist(), *flags], device=accelerator.device)
    every = accelerator.reduce(own, reduction="sum").tolist()
    n = len(sums)
    return every[:n], StepRequests(*(count > 0 for count in every[n:-1])), every[-1] > 0


def _is_checkpointed(run: Run) -> bool:
    """Whether the layers are computed again in the backward pass."""
    base = base_of(run.plain_model)
    # transformers 5.23 renamed it and warns of the old name; 5.20 has only the old one.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(getattr(base, next((name for name in names if hasattr(type(base), name)), ""), False))


def _in_use(run: Run) -> str:
    """The plan beside the measurement."""
    planned = f"{run.planned_bytes / 2**30:.2f} GiB were planned"
    peak = peak_reserved_bytes()
    if run.accelerator.device.type == "cpu" or peak is None:
        return planned
    free, total = free_and_total_bytes()
    return f"{planned}, the peak was {peak / 2**30:.2f}, and {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"
