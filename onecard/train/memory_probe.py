"""Before the first step: the largest micro-batches that the data can make, forward, backward and in evaluation.

These are the one with the most tokens and, where another one it is, the longest row, whose attention is the largest.

What does not fit is found in the first minute and not in the fourth hour; the limits are then made smaller at once
(`oom.py`). Weights, optimizer and random numbers are left as they were. Knows the loop's `Run`; does not know how
memory was planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from accelerate.utils import gather_object

from onecard.console import say
from onecard.data.batches import steps_per_epoch
from onecard.data.packing import packed
from onecard.model.hardware import peak_reserved_bytes, reset_peak
from onecard.model.memory.estimate import GIB
from onecard.train.intervals import WAIT_PER_TIME_TAKEN
from onecard.train.oom import MicroBatchLimits
from onecard.train.run import Run
from onecard.train.step import accumulate, make_room
from onecard.train.validation import evaluate

# On a CPU, by itself: a probe of at most this share of the run's tokens, or where less room than this is left.
LARGEST_SHARE, ENOUGH_ROOM = 0.03, 0.5
MOST_TRIED = 4096  # samples in which rows to share are looked for


@dataclass(frozen=True)
class LargestMicroBatch:
    """The largest micro-batch: `rows` rows of `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


def worst_micro_batch(lengths: np.ndarray, limits: MicroBatchLimits, total_batch: int) -> LargestMicroBatch:
    """The micro-batch with the most padded tokens that `limits` allow for samples of these lengths.

    lengths [900, 250, 250, 250, 250], 1,000 tokens: [250 x 4] is larger than [900]. In steps of 2 samples it is [900].
    """
    longest_first = np.sort(lengths)[::-1].astype(np.int64)
    n_shorter = len(lengths) - np.searchsorted(-longest_first, -longest_first, side="left")
    rows = np.minimum(n_shorter, total_batch)
    if limits.micro_batch:
        rows = np.minimum(rows, limits.micro_batch)
    if limits.micro_tokens:
        rows = np.minimum(rows, np.maximum(1, limits.micro_tokens // np.maximum(1, longest_first)))
    best = int(np.argmax(rows * longest_first))
    return LargestMicroBatch(int(rows[best]), int(longest_first[best]))


def probe_if_wanted(run: Run, wanted: bool | Literal["auto"]) -> None:
    """Probe the memory, or say why not. auto: on a card always; on a CPU where memory is short or it takes little time.

    There the plan is exact and the machine's memory large, while a short run would wait longer than it trains.
    """
    share, plan = _share_of_run(run), run.plan
    if wanted == "auto" and plan is not None and not plan.card.is_gpu:
        limit = min(plan.card.total_bytes, plan.card.ram_bytes)
        needless = share > LARGEST_SHARE and run.planned_bytes < ENOUGH_ROOM * limit
        wanted = not needless  # the same on every process: their plan is for the same card
        if not wanted and run.state.step < run.state.total_steps:
            say(f"no rehearsal: it would take {min(1.0, share):.0%} of the time of this run, and "
                f"{run.planned_bytes / GIB:.2f} of {limit / GIB:.1f} GiB are planned (--rehearsal on)")  # fmt: skip
    if wanted and run.state.step < run.state.total_steps:
        probe_memory(run)


def _share_of_run(run: Run) -> float:
    """The tokens of a probe as a share of those that are left to train on, padding aside."""
    lengths = _lengths(run)
    worst, _ = _largest(lengths, run.limits, _rows_per_step(run))
    longest = int(lengths.max())
    tried = 2 * worst.tokens + (2 * longest if worst.length < longest else 0)
    return tried / max(1.0, _tokens_left(run))


def probe_memory(run: Run) -> None:
    """Try the worst micro-batch of training and of evaluation; say the peak beside the plan's, and how long it takes.

    Raises ModelError, with the plan beside what happened, when not even the smallest limits fit.
    """
    if run.options.deepspeed:
        say("no rehearsal under DeepSpeed, which cannot forget gradients")
        return
    reset_peak()
    run.model.train()  # layers are computed again in this mode only
    lengths = _lengths(run)
    started = time.monotonic()
    worst = _fitting(run, lambda: _largest(lengths, run.limits, _rows_per_step(run)))
    seconds = (time.monotonic() - started) / 2
    longest = int(np.argmax(lengths))
    if worst.length < lengths[longest]:
        _fitting(run, lambda: (LargestMicroBatch(1, int(lengths[longest])), np.array([longest])))
    run.engine.forget()
    evaluation_s = _probe_evaluation(run) if run.test_samples else 0.0
    said = f"rehearsed {worst.rows} x {worst.length:,} tokens"
    peak = peak_reserved_bytes()
    if peak is not None and run.accelerator.device.type != "cpu":
        said += f": peak {peak / GIB:.2f} GiB reserved, {run.planned_bytes / GIB:.2f} GiB planned"
    reset_peak()
    say(f"{said}; {_duration(run, worst.tokens / max(seconds, 1e-9), evaluation_s)}")


def _probe_evaluation(run: Run) -> float:
    """Evaluate the largest micro-batch of held-out rows; returns the seconds that all would take at its speed."""
    lengths = run.objective.lengths(run.test_samples)
    largest, samples = _largest(lengths, run.limits, len(lengths))
    started = time.monotonic()
    evaluate(run, [run.test_samples[int(i)] for i in samples])
    return (time.monotonic() - started) * float(lengths.sum()) / largest.tokens / run.accelerator.num_processes


def _fitting(run: Run, worst_now: Callable[[], tuple[LargestMicroBatch, np.ndarray]]) -> LargestMicroBatch:
    """Forward and backward of the worst micro-batch, under smaller limits until it passes; returns the one that did."""
    while True:
        worst, rows = worst_now()
        samples = rows // run.options.answers_per_prompt
        # Twice, so that the second meets the gradients of the first, as in a step.
        failed = [any(accumulate(run, run.train_samples, [samples], worst.tokens)[1] for _ in range(2))]
        if not any(gather_object(failed)):
            run.n_failures = 0
            return worst
        make_room(run, np.full(worst.rows, worst.length))


def _duration(run: Run, tokens_per_s: float, evaluation_s: float) -> str:
    """The rest of the run at this speed. The first pass is the slowest, so it is an upper estimate."""
    training = _tokens_left(run) / run.accelerator.num_processes / tokens_per_s / 60
    evaluating = _n_evaluations(run.state.step, run.state.total_steps, run.options.eval_steps) * evaluation_s / 60
    if run.options.eval_minutes:  # those by the clock
        n_more = training // run.options.eval_minutes
        evaluating += min(n_more * evaluation_s / 60, training / WAIT_PER_TIME_TAKEN)
    part = f", {_span(evaluating)} of it for evaluation" if evaluating else ""
    return f"at its speed the run would take at most about {_span(training + evaluating)}{part}"


def _n_evaluations(step: int, total_steps: int, eval_steps: int) -> int:
    """Evaluations by the number of steps from here to the end, that of the last step too."""
    return total_steps // eval_steps - step // eval_steps + (total_steps % eval_steps > 0)


def _span(minutes: float) -> str:
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"


def _tokens_left(run: Run) -> float:
    """Tokens of the steps to come."""
    data = run.train_samples
    per_epoch = float(data.lengths.mean()) * data.n_per_epoch
    per_step = per_epoch / steps_per_epoch(data.n_per_epoch, run.options.total_batch)
    return (run.state.total_steps - run.state.step) * per_step * run.options.answers_per_prompt


def _lengths(run: Run) -> np.ndarray:
    """Of the rows that steps are made of: each prompt is in a step with several answers."""
    return np.repeat(run.train_samples.lengths, run.options.answers_per_prompt)


def _rows_per_step(run: Run) -> int:
    return run.options.total_batch * run.options.answers_per_prompt


def _largest(lengths: np.ndarray, limits: MicroBatchLimits, total_batch: int) -> tuple[LargestMicroBatch, np.ndarray]:
    """`worst_micro_batch`, and samples that make it; where they share rows, of rows that a step can have."""
    rows = _fullest_rows(lengths, limits, total_batch) if limits.row_tokens else None
    if rows is not None:
        lengths = np.array([lengths[row].sum() for row in rows])
    worst = worst_micro_batch(lengths, limits, total_batch)
    fitting = np.flatnonzero(lengths <= worst.length)
    chosen = fitting[np.argsort(-lengths[fitting].astype(np.int64), kind="stable")[: worst.rows]]
    return worst, chosen if rows is None else np.concatenate([rows[number] for number in np.sort(chosen)])


def _fullest_rows(lengths: np.ndarray, limits: MicroBatchLimits, total_batch: int) -> list[np.ndarray]:
    """Shared rows of one step's samples, the fullest that some thousand samples can make, in the order of packing."""
    capacity = min(limits.row_tokens, limits.micro_tokens or limits.row_tokens)
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    some = longest_first[:: -(-len(lengths) // MOST_TRIED)]
    rows = [row for row in packed(some, lengths, capacity) if len(row) <= total_batch]
    rows = rows or packed(longest_first[:total_batch], lengths, capacity)
    by_tokens = sorted(range(len(rows)), key=lambda number: -int(lengths[rows[number]].sum()))
    n_samples = np.cumsum([len(rows[number]) for number in by_tokens])
    return [rows[number] for number in sorted(by_tokens[: max(1, int((n_samples <= total_batch).sum()))])]
