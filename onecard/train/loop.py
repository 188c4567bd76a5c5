"""The training loop of one run, top to bottom.

next step (`step.py`: samples and learning rate -> micro-batches -> loss per unit of the *whole* step ->
clip -> optimizer) -> log -> maybe evaluate -> maybe save (`intervals.py`). `accelerate` brings mixed precision, the
fp16 scaler, several GPUs and DeepSpeed. An optimizer step is a set of samples; how it is cut into micro-batches and
spread over processes changes memory and speed, never the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from onecard.config.run import TrainOptions
from onecard.console import say, warn
from onecard.data.batches import step_samples, steps_per_epoch
from onecard.errors import CheckpointError, DataError, Stopped
from onecard.model.hardware import peak_reserved_bytes
from onecard.objectives.reward_file import RewardError
from onecard.train.intervals import Timer
from onecard.train.run import Run, RunEvent, report_events
from onecard.train.run_control import RunControl
from onecard.train.signals import Interrupts
from onecard.train.source_losses import SourceLosses
from onecard.train.state import TrainerState, write_state
from onecard.train.step import NotFinite, StepRequests, StepResult, take_step
from onecard.train.trackers import Reporter, rounded
from onecard.train.validation import validate

# The fp16 scaler halves its scale with each step that it leaves out; from 65,536 this many halvings lead to nothing.
MAX_SKIPPED_IN_A_ROW = 50
SHORTEST_WAIT_S = 0.1  # less is a look into the control folder


def total_steps(options: TrainOptions, n_samples: int) -> int:
    """Optimizer steps of the whole run: ``--max_steps``, or ``--num_epoch`` times the steps of an epoch, rounded up."""
    planned = math.ceil(options.num_epoch * steps_per_epoch(n_samples, options.total_batch))
    return min(planned, options.max_steps) if options.max_steps and planned else options.max_steps or planned


def train(run: Run, reporter: Reporter) -> TrainerState:
    """Train to the last step, saving on the way; returns the final state with the last checkpoint written.

    Raises Stopped after Ctrl-C or SIGTERM, with the finished step saved; NotFinite when the loss is NaN or Inf, where
    the newest checkpoint holds the last finite weights; CheckpointError when the *final* one cannot be written.
    """
    options, state = run.options, run.state
    run.model.train()
    report_events(run, reporter)  # those of the memory probe
    evaluation, saves = Timer(options.eval_minutes), SavedCheckpoints(run, Timer(options.save_minutes))
    control = run.control or RunControl()
    control.folder.say("training", state.step, state.total_steps)
    if state.step == 0:
        control.ask_standing(run)
    skipped_in_a_row, is_asked = 0, run.accelerator.num_processes == 1
    sources = SourceLosses(run.train_samples.dataset.names)
    with Interrupts() as interrupts:

        def requested() -> StepRequests:
            first = run.accelerator.is_main_process  # one clock for all
            due = evaluation.is_due(), saves.timer.is_due(), control.is_requested()
            return StepRequests(interrupts.requested is not None, *(first and each for each in due))

        while state.step < state.total_steps and not _has_stopped_early(run):
            if is_asked and _asked_to_stop(control, interrupts, saves, evaluation):
                raise Stopped(saves.stopped_by(interrupts.requested or "a request"), interrupts.exit_code or 143)
            started_s = time.monotonic()
            result = _step_or_keep(run, saves, requested)
            seconds = time.monotonic() - started_s
            state.step += 1
            state.tokens_seen += result.tokens
            sources.add(result.by_source, state.source_tokens)
            state.skipped_steps += result.skipped
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise NotFinite(_overflowing(state.step))
            _keep_to_the_clock(run, seconds, evaluation_s=evaluation.took_s, saving_s=saves.timer.took_s)
            reporter.plan_for(state.total_steps)
            report_events(run, reporter)
            control.folder.at_step(state.step, state.total_steps)
            _report(run, reporter, result, seconds, sources)
            last, improved = state.step == state.total_steps, False
            if last or result.requests.evaluate or state.step % options.eval_steps == 0:
                improved = evaluation.timed(_evaluate_and_ask, run, reporter, control)
            last = last or _has_stopped_early(run)
            report_events(run, reporter)
            # One process alone may stop for a signal that came since; several must have agreed within the step.
            alone = run.accelerator.num_processes == 1
            is_asked = alone or result.requests.control
            stop = result.requests.stop or (alone and interrupts.requested is not None)
            if improved or last or stop or result.requests.save or state.step % options.save_steps == 0:
                saves.save(final=last or stop)
            if stop and not last:
                name = interrupts.requested or "a signal to another process"
                raise Stopped(saves.stopped_by(name), interrupts.exit_code or 143)
    control.folder.refuse_all()
    control.folder.say("evaluating", state.step, state.total_steps)  # of the result, if it is to be measured
    _say_why_it_ended(run)
    return state


def _say_why_it_ended(run: Run) -> None:
    """Where that is not the last step that was planned."""
    state = run.state
    if _has_stopped_early(run):
        lower = "lower loss" if run.options.stop_on == "loss" else "lower sum of loss and forgetting"
        reason = f"{state.evaluations_since_best} evaluations in a row found no {lower} (--early_stopping_patience)"
        say(f"ended after step {state.step} of {state.total_steps}: {reason}")
    if run.clock is not None and state.clock == run.clock.option and state.step == state.total_steps:
        say(f"ended after step {state.step} by {state.clock}; without it, or with another time, the run goes on")


def _has_stopped_early(run: Run) -> bool:
    """Whether --early_stopping_patience is used up; by the state alone, so that a further start does no more."""
    return 0 < run.options.early_stopping_patience <= run.state.evaluations_since_best


def _keep_to_the_clock(run: Run, seconds: float, *, evaluation_s: float, saving_s: float) -> None:
    """After a step that took so long: plan for the steps that fit before the end by the clock, on every process."""
    clock, state = run.clock, run.state
    if clock is None:
        return
    clock.step_took(seconds)
    total = clock.total_steps(state.step, state.total_steps, run.options, n_test=len(run.test_samples),
                              evaluation_s=evaluation_s, saving_s=saving_s)  # fmt: skip
    if run.accelerator.num_processes > 1:
        total = broadcast_object_list([total])[0]
    state.seconds = clock.spent_s
    if total < state.total_steps:
        message = f"step {state.step}: {total:,} steps fit, not {state.total_steps:,} ({clock.option})"
        run.events.append(RunEvent({"step": state.step, "event": "schedule", "total_steps": total}, message))
        state.total_steps, state.clock = total, clock.option


@dataclass
class SavedCheckpoints:
    """The checkpoints of a run: when the next one is due by the clock, and the step of the newest."""

    run: Run
    timer: Timer
    step: int = -1

    def __post_init__(self) -> None:
        self.step = self.run.state.step

    @property
    def is_current(self) -> bool:
        """Whether the present step is saved, or there is nothing to be saved yet."""
        return self.step == self.run.state.step

    def save(self, *, final: bool) -> int:
        """Save the present step unless that is done; returns the step of the newest checkpoint. Raises as `save`."""
        if not self.is_current:
            self.step = self.timer.timed(save, self.run, final=final) or self.step
        return self.step

    def stopped_by(self, name: str) -> str:
        """What is said of a run that ends now."""
        end = f"stopped by {name} after step {self.run.state.step} of {self.run.state.total_steps}"
        if not self.step:
            return f"{end}; there was nothing to save yet"
        return f"{end}; checkpoint-{self.step} is saved. The same command goes on from there."


def _asked_to_stop(control: RunControl, interrupts: Interrupts, saves: SavedCheckpoints, evaluation: Timer) -> bool:
    """Carry out what was asked through the control folder; the time that takes is no training time."""
    began_s = time.time()  # not monotonic: that one stands still while a laptop sleeps
    stop = control.obey(saves.run, interrupts, saves)
    seconds = time.time() - began_s
    if seconds > SHORTEST_WAIT_S:
        for timer in (evaluation, saves.timer):
            timer.put_off(seconds)
        if saves.run.clock is not None:
            saves.run.clock.waited(seconds)
    return stop


def _step_or_keep(run: Run, saves: SavedCheckpoints, requested: Callable[[], StepRequests]) -> StepResult:
    """One step; where it is not taken (not finite, no reward), the weights of the step before are kept first."""
    try:
        return take_step(run, requested)
    except (NotFinite, RewardError, DataError):
        saves.save(final=False)
        raise


def save(run: Run, *, final: bool) -> int | None:
    """Write a checkpoint of the present step and return the step; None when the disk had no room.

    Raises CheckpointError only for a `final` one: a full disk in the middle of the night must not end the run.
    """
    accelerator, state = run.accelerator, run.state
    # On every process: state that is divided between them has to meet before one of them can write it.
    training = {name: holder.state_dict() for name, holder in run.training.items()}
    failure: CheckpointError | None = None
    with run.engine.whole_weights():
        if accelerator.is_main_process:
            try:
                run.store.save(
                    state.step,
                    lambda directory: write_state(directory, run.plain_model, training, state),
                    best_steps=(state.best_step, state.balanced_step),
                    keep_last=run.options.n_kept,
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


def _known_to_all(accelerator: Any, failure: CheckpointError | None) -> CheckpointError | None:
    """What kept the first process from saving, on every process: they must go on, or end, together."""
    if accelerator.num_processes == 1:
        return failure
    told = broadcast_object_list([None if failure is None else (str(failure), failure.disk_full)])[0]
    return failure if failure is not None or told is None else CheckpointError(told[0], disk_full=told[1])


def _report(run: Run, reporter: Reporter, result: StepResult, seconds: float, sources: SourceLosses) -> None:
    options, state, data = run.options, run.state, run.train_samples
    row: dict[str, Any] = {
        "step": state.step,
        "epoch": round(state.step / steps_per_epoch(data.n_per_epoch, options.total_batch), 4),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "skipped_steps": state.skipped_steps,
        **rounded(result.metrics),
    }
    peak = peak_reserved_bytes()
    if peak is not None:
        row["peak_bytes"] = peak
    if options.log_samples:
        chosen = step_samples(state.step - 1, data.order, options.total_batch, options.seed)
        row["samples"] = run.records(chosen.indices)
    due = state.step % options.log_steps == 0 or state.step == state.total_steps or options.log_samples
    if due:
        row |= sources.row(state.source_tokens)
    reporter.step(row, to_file=due, tokens=result.tokens, seconds=seconds)


def _evaluate_and_ask(run: Run, reporter: Reporter, control: RunControl) -> bool:
    """Evaluate, and ask the questions of --ask and --ask_file; True when this is the best step so far."""
    with control.folder.meanwhile("evaluating"):
        improved = validate(run, reporter)
        control.ask_standing(run)
    return improved


def _overflowing(step: int) -> str:
    return (
        f"step {step}: the gradients overflowed fp16 in {MAX_SKIPPED_IN_A_ROW} steps in a row, so nothing is learned.\n"
        "This model does not bear fp16: use --dtype fp32, or --dtype bf16 on a card that has it."
    )
