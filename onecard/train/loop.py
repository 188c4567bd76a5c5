"""One run, top to bottom.

next step's samples -> micro-batches -> loss per supervised token of the *whole* step -> clip -> optimizer -> schedule
-> log -> maybe evaluate -> maybe save. `accelerate` brings mixed precision, the fp16 scaler, several GPUs and
DeepSpeed. An optimizer step is a set of samples; how it is cut into micro-batches and spread over processes changes
memory and speed, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from onecard.config import TrainOptions
from onecard.console import CheckpointError, OneCardError, Stopped, warn
from onecard.model.loss import summed_loss
from onecard.text.batches import collate, micro_batches, share_for_rank, step_samples, steps_per_epoch
from onecard.text.encode import Encoded
from onecard.train.checkpoint import CheckpointStore
from onecard.train.deepspeed_engine import DeepSpeedEngine
from onecard.train.engine import Engine
from onecard.train.evaluate import evaluation_loss
from onecard.train.interrupts import Interrupts
from onecard.train.reporting import Reporter
from onecard.train.state import TrainerState, restore_state, seed_step, write_state

DEFAULT_MICRO_TOKENS = 4096
# The fp16 scaler halves its scale with each step that it leaves out; from 65,536 this many halvings lead to nothing.
MAX_SKIPPED_IN_A_ROW = 50


@dataclass
class Run:
    """Everything that one run is made of. The recipe fills it; `train` uses it up."""

    options: TrainOptions
    model: Any
    """The adapter over the base, as accelerate prepared it."""
    plain_model: Any
    """The same without a wrapper: what is saved."""
    optimizer: Any
    schedule: Any
    accelerator: Any
    train_samples: Any
    """A sequence of `Encoded`, with `lengths` and `supervised` arrays of the same order."""
    test_samples: list[Encoded]
    store: CheckpointStore
    state: TrainerState = field(default_factory=TrainerState)

    @cached_property
    def engine(self) -> Engine | DeepSpeedEngine:
        """Backward and step, plain or through DeepSpeed."""
        if self.options.deepspeed:
            return DeepSpeedEngine(self.accelerator, self.model, self.optimizer)
        return Engine(self.accelerator, self.model, self.optimizer, self.options.max_grad_norm)

    @property
    def limits(self) -> dict[str, int]:
        """How much passes through the model at once."""
        tokens = self.options.micro_tokens or (0 if self.options.micro_batch else DEFAULT_MICRO_TOKENS)
        return {"micro_batch": self.options.micro_batch, "micro_tokens": tokens}

    @property
    def training(self) -> dict[str, Any]:
        """What a checkpoint holds besides the adapter, by file name."""
        scaler = self.engine.scaler
        objects = {"optimizer.pt": self.optimizer, "scheduler.pt": self.schedule}
        return {**objects, "scaler.pt": scaler} if scaler is not None else objects


class NotFinite(OneCardError):
    """A step whose loss or gradient is NaN or Inf; it was not taken."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    skipped: bool
    stop: bool


def total_steps(options: TrainOptions, n_samples: int) -> int:
    """Optimizer steps of the whole run: ``--max_steps``, or ``--num_epoch`` times the steps of an epoch, rounded up."""
    planned = math.ceil(options.num_epoch * steps_per_epoch(n_samples, options.total_batch))
    return min(planned, options.max_steps) if options.max_steps and planned else options.max_steps or planned


def train(run: Run, reporter: Reporter) -> TrainerState:
    """Train to the last step, saving on the way; returns the final state with the last checkpoint written.

    Raises:
        Stopped: after Ctrl-C or SIGTERM, with the finished step saved.
        NotFinite: when the loss is NaN or Inf; the newest checkpoint then holds the last finite weights.
        CheckpointError: when the *final* checkpoint cannot be written.
    """
    options, state = run.options, run.state
    run.model.train()
    saved_step, skipped_in_a_row = state.step, 0
    with Interrupts() as interrupts:
        while state.step < state.total_steps:
            result = _step_or_keep(run, saved_step, interrupts)
            state.step += 1
            state.tokens_seen += result.tokens
            state.skipped_steps += result.skipped
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise NotFinite(_overflowing(state.step))
            _report(run, reporter, result)
            last = state.step == state.total_steps
            improved = (last or state.step % options.eval_steps == 0) and _evaluate(run, reporter)
            # One process alone may stop for a signal that came since; several must have agreed within the step.
            stop = result.stop or (run.accelerator.num_processes == 1 and interrupts.requested is not None)
            if improved or last or stop or state.step % options.save_steps == 0:
                saved_step = save(run, final=last or stop) or saved_step
            if stop and not last:
                name = interrupts.requested or "a signal to another process"
                message = f"stopped by {name} after step {state.step} of {state.total_steps}; checkpoint-{saved_step}"
                raise Stopped(f"{message} is saved. The same command goes on from there.", interrupts.exit_code or 143)
    return state


def _step_or_keep(run: Run, saved_step: int, interrupts: Interrupts) -> StepResult:
    """One step; when it is not finite, the weights are still those of the step before: they are kept first."""
    try:
        return take_step(run, asked_to_stop=lambda: interrupts.requested is not None)
    except NotFinite:
        if saved_step != run.state.step:
            save(run, final=False)
        raise


def take_step(run: Run, asked_to_stop: Callable[[], bool] = lambda: False) -> StepResult:
    """One optimizer step over the samples that (seed, step) names, whatever the number of processes.

    The loss is the sum over all micro-batches of all processes, divided by the supervised tokens of the whole step.
    For samples with 3 and 5 answer tokens it is (sum of 8 losses) / 8, whether they pass together or one by one.
    """
    options, accelerator, data = run.options, run.accelerator, run.train_samples
    chosen = step_samples(run.state.step, len(data), options.total_batch, options.seed)
    lengths = data.lengths[chosen.indices]
    supervised = int(data.supervised[chosen.indices].sum())
    micros = share_for_rank(
        micro_batches(chosen.indices, data.lengths, **run.limits),
        accelerator.process_index,
        accelerator.num_processes,
        data.lengths,
    )
    seed_step(options.seed, run.state.step, accelerator.process_index)
    loss_sum = torch.zeros((), device=accelerator.device)
    for position, micro in enumerate(micros):
        is_last = position == len(micros) - 1
        with run.engine.gathering(is_last):
            loss_sum += _backward(run, micro, supervised, is_last)
    loss, stop = _agree(accelerator, loss_sum, asked_to_stop())
    if not math.isfinite(loss):
        raise NotFinite(_not_finite(run, chosen.indices, f"the loss is {loss}"))
    norm = run.engine.clip()
    if not math.isfinite(norm) and not run.engine.has_scaler:
        raise NotFinite(_not_finite(run, chosen.indices, f"the gradient norm is {norm}"))
    learning_rate = run.optimizer.param_groups[0]["lr"]
    skipped = run.engine.step()
    run.schedule.step()
    return StepResult(loss, norm, int(lengths.sum()), learning_rate, skipped, stop)


def save(run: Run, *, final: bool) -> int | None:
    """Write a checkpoint of the present step and return the step; None when the disk had no room.

    Raises CheckpointError only for a `final` one: a full disk in the middle of the night must not end the run.
    """
    accelerator, state = run.accelerator, run.state
    # On every process: state that is divided between them has to meet before one of them can write it.
    training = {name: holder.state_dict() for name, holder in run.training.items()}
    failure: CheckpointError | None = None
    if accelerator.is_main_process:
        try:
            run.store.save(
                state.step,
                lambda directory: write_state(directory, run.plain_model, training, state),
                best_step=state.best_step,
                keep_last=run.options.keep_checkpoints,
            )
        except CheckpointError as reason:
            failure = reason
    failure = _known_to_all(accelerator, failure)
    if failure is None:
        return state.step
    if final or not failure.disk_full:
        raise failure
    warn(f"{failure}\n         Training goes on; the previous checkpoint stays.")
    return None


def resume(run: Run, directory: Path, *, from_data_beginning: bool = False) -> None:
    """Put a checkpoint back into a run that was just built: adapter, optimizer, schedule and scaler.

    With `from_data_beginning` the schedule begins anew, as the data does; weights and optimizer state stay.
    """
    training = run.training
    if from_data_beginning:
        del training["scheduler.pt"]
    restore_state(directory, run.plain_model, training)
    if from_data_beginning:
        # The optimizer's state carries the old learning rate; the new schedule says what it is now.
        for group, rate in zip(run.optimizer.param_groups, run.schedule.get_last_lr(), strict=True):
            group["lr"] = rate


def _backward(run: Run, micro: np.ndarray | None, supervised: int, is_last: bool) -> torch.Tensor:
    """Forward and backward of one micro-batch; returns its share of the step's loss, detached.

    `None` stands for a process that got fewer micro-batches than the others: it computes one with weight 0, because
    every process has to take part in the exchange of gradients.
    """
    accelerator = run.accelerator
    samples = [run.train_samples[int(i)] for i in (micro if micro is not None else [0])]
    batch = {name: t.to(accelerator.device) for name, t in collate(samples, pad_id=0).items()}
    with accelerator.autocast():
        loss_sum, _ = summed_loss(run.model, batch)
    loss = loss_sum / max(1, supervised) * (micro is not None)
    run.engine.backward(loss, is_last)
    return loss.detach()


def _agree(accelerator: Any, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """The step's loss over all processes, and whether any of them was asked to stop: all must stop at one step."""
    if accelerator.num_processes == 1:
        return float(loss), stop
    both = torch.stack([loss.float(), torch.tensor(float(stop), device=loss.device)])
    both = accelerator.reduce(both, reduction="sum")
    return float(both[0]), bool(both[1] > 0)


def _known_to_all(accelerator: Any, failure: CheckpointError | None) -> CheckpointError | None:
    """What kept the first process from saving, on every process: they must go on, or end, together."""
    if accelerator.num_processes == 1:
        return failure
    told = broadcast_object_list([None if failure is None else (str(failure), failure.disk_full)])[0]
    return failure if failure is not None or told is None else CheckpointError(told[0], disk_full=told[1])


def _report(run: Run, reporter: Reporter, result: StepResult) -> None:
    options, state, data = run.options, run.state, run.train_samples
    row: dict[str, Any] = {
        "step": state.step,
        "epoch": round(state.step / steps_per_epoch(len(data), options.total_batch), 4),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "skipped_steps": state.skipped_steps,
    }
    if torch.cuda.is_available():
        row["peak_bytes"] = torch.cuda.max_memory_reserved()
    if options.log_samples:
        row["samples"] = _records(
            run, step_samples(state.step - 1, len(data), options.total_batch, options.seed).indices
        )
    due = state.step % options.log_steps == 0 or state.step == state.total_steps or options.log_samples
    reporter.step(row, to_file=due, tokens_seen=state.tokens_seen)


def _evaluate(run: Run, reporter: Reporter) -> bool:
    """Evaluate if there are held-out rows; True when this is the best step so far."""
    state = run.state
    if not run.test_samples:
        return False
    loss = evaluation_loss(run.model, run.test_samples, run.accelerator, **run.limits)
    improved = state.best_loss is None or loss < state.best_loss
    if improved:
        state.best_step, state.best_loss = state.step, loss
    row = {"step": state.step, "eval_loss": loss, "best_step": state.best_step}
    reporter.event(row, f"step {state.step}: evaluation loss {loss:.4f}" + (" (best so far)" if improved else ""))
    return improved


def _overflowing(step: int) -> str:
    return (
        f"step {step}: the gradients overflowed fp16 in {MAX_SKIPPED_IN_A_ROW} steps in a row, so nothing is learned.\n"
        "This model does not bear fp16: use --dtype fp32, or --dtype bf16 on a card that has it."
    )


def _records(run: Run, indices: np.ndarray) -> list[str]:
    return [run.train_samples[int(i)].record for i in indices]


def _not_finite(run: Run, indices: np.ndarray, what: str) -> str:
    run.engine.forget()
    records = "\n  ".join(_records(run, indices))
    return (
        f"step {run.state.step + 1}: {what}. This step was not taken; the newest checkpoint is finite.\n"
        f"The step's records are:\n  {records}\n"
        "Look at them with tools/inspect_data.py. Are they sound, then lower --learning_rate, or use --dtype fp32."
    )
