"""When a run evaluates and when it saves: every so many steps, chosen from its length, and by the clock.

Neither changes what is learned. Knows options, numbers of steps and a clock; what is done then is `loop.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from onecard.config.run import TrainOptions
from onecard.console import say
from onecard.data.batches import steps_per_epoch

Result = TypeVar("Result")
MOST_STEPS = 200
EVALUATIONS = 3  # at least, so that the best of them means something
CHECKPOINTS = 8  # at least: killed at half, a run has lost no more than a quarter of what was done
# Time for a row in evaluation, for one in training: a pass forward against one forward and one backward, if not two.
EVALUATED_PER_TRAINED = 0.5
WAIT_PER_TIME_TAKEN = 9  # so that what is done by the clock takes a tenth of the time at most


def resolve_intervals(options: TrainOptions, n_rows: int, n_test: int, total_steps: int) -> TrainOptions:
    """Fill in --eval_steps and --save_steps where they are 0, for a run of this length over `n_rows` training rows.

    24 steps in 3 epochs: evaluated every 8 steps, saved every 3; 10,000 steps: both every 200, unless `n_test` rows so
    often would take more than a tenth of the time.
    """
    most = min(MOST_STEPS, steps_per_epoch(n_rows, options.total_batch))
    third = -(-total_steps // EVALUATIONS)
    if third > 1 and -(-total_steps // third) < EVALUATIONS:
        third -= 1  # every second of 4 steps would be two evaluations
    seldom = math.ceil(WAIT_PER_TIME_TAKEN * EVALUATED_PER_TRAINED * n_test / options.total_batch)
    return replace(
        options,
        eval_steps=options.eval_steps or max(1, min(total_steps, max(seldom, min(most, third)))),
        save_steps=options.save_steps or max(1, min(most, total_steps // CHECKPOINTS)),
    )


def say_intervals(typed: TrainOptions, resolved: TrainOptions, n_test: int, total_steps: int) -> None:
    """Say how often is evaluated and saved, and why so often."""
    parts = [("--save_steps", "a checkpoint", typed.save_steps, resolved.save_steps, typed.save_minutes)]
    if n_test:
        parts.insert(0, ("--eval_steps", "an evaluation", typed.eval_steps, resolved.eval_steps, typed.eval_minutes))
    for flag, what, given, steps, minutes in parts:
        clock = f" or {minutes:g} minutes" if minutes else ""
        off = "; --test_size 0 turns it off" if flag == "--eval_steps" else ""
        reason = "as given" if given else f"the run has {total_steps:,}; {flag} sets another number{off}"
        share = f", at most {evaluation_share(resolved, n_test):.0%} of the time" if flag == "--eval_steps" else ""
        say(f"{what} every {f'{steps} steps' if steps > 1 else 'step'}{clock}{share} ({reason})")


def evaluation_share(options: TrainOptions, n_test: int) -> float:
    """The most of a run's time that evaluations by --eval_steps take."""
    evaluated = EVALUATED_PER_TRAINED * n_test
    return evaluated / (evaluated + options.eval_steps * options.total_batch)


class Timer:
    """Whether something that is done again and again is due by the clock; with 0 minutes it never is."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._ended_s, self.took_s = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether the time since it was done last is over; after something slow that is longer."""
        waited = time.monotonic() - self._ended_s
        return self.seconds > 0 and waited >= max(self.seconds, WAIT_PER_TIME_TAKEN * self.took_s)

    def put_off(self, seconds: float) -> None:
        """Wait so much longer: the run itself waited."""
        self._ended_s = min(time.monotonic(), self._ended_s + seconds)

    def timed(self, work: Callable[..., Result], *args: Any, **named: Any) -> Result:
        """Do it, for whatever reason, and wait again from now on."""
        started_s = time.monotonic()
        result = work(*args, **named)
        self._ended_s = time.monotonic()
        self.took_s = self._ended_s - started_s
        return result
