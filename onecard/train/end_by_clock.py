"""--finish_by and --max_hours: how many steps fit until a time, so that the learning rate has fallen by then.

Steps, evaluations and checkpoints are timed as they come. The schedule is laid over the steps that fit once a few have
been measured, and once more if the machine becomes slower; after that the run ends where the next step would be too
much. Knows a clock and numbers of steps; what a step is, is `loop.py`'s.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime, timedelta
from statistics import fmean

from onecard.config.run import TrainOptions, moment
from onecard.errors import ConfigError
from onecard.train.intervals import EVALUATED_PER_TRAINED

now_s = time.time  # not monotonic: that one stands still while a laptop sleeps
# The schedule is laid when so many steps are timed, or so few and this share of the time is over. The first is slower
# and does not count.
MEASURED_STEPS, FEWEST_MEASURED, MEASURED_SHARE = 20, 4, 0.05
RECENT_STEPS = 50
LATE_SHARE = 0.05  # so much slower, by the steps that are left, lays the schedule anew
# Of the whole time, kept free for what is not timed: the adapter in its place, loss.png, the last shutdown.
SPARE_SHARE, MOST_SPARE_S = 0.01, 60.0


class EndByClock:
    """The end of a run by the clock, counted from when this is made.

    option: as typed, such as `--finish_by 07:00`. end_s: when the run has to be over, in seconds since 1970.
    """

    def __init__(self, option: str, seconds: float) -> None:
        self.option, self._began_s, self._earlier_s = option, now_s(), 0.0
        self._span_s, self.end_s = seconds, self._began_s + seconds
        self._spare_s = min(MOST_SPARE_S, SPARE_SHARE * seconds)
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._n_steps = self._times_laid = 0

    @property
    def spent_s(self) -> float:
        """Seconds of this start and of those before it."""
        return self._earlier_s + now_s() - self._began_s

    def resume(self, earlier_s: float) -> None:
        """Take the seconds of earlier starts off --max_hours; the end by --finish_by stays."""
        self._earlier_s = earlier_s
        if self.option.startswith("--max_hours"):
            self.end_s -= earlier_s

    def waited(self, seconds: float) -> None:
        """Leave out time in which the run waited or answered: --max_hours ends later, --finish_by when it says."""
        self._began_s += seconds
        if self.option.startswith("--max_hours"):
            self.end_s += seconds

    def step_took(self, seconds: float) -> None:
        """Time one step, without the evaluation and the checkpoint that come after it."""
        self._n_steps += 1
        if self._n_steps > 1 or seconds > self.end_s - now_s():
            self._steps.append(seconds)

    def total_steps(
        self, step: int, planned: int, options: TrainOptions, *, n_test: int, evaluation_s: float, saving_s: float
    ) -> int:
        """After `step` steps: the total to plan for, at most `planned`; `step` itself where the next is too much.

        n_test: rows of an evaluation. evaluation_s, saving_s: what the last ones took; 0: not known yet.
        """
        left_s = self.end_s - self._spare_s - now_s() - saving_s
        if not self._steps:
            return planned if left_s > 0 else step
        step_s = fmean(self._steps)
        evaluation_s = evaluation_s or step_s * EVALUATED_PER_TRAINED * n_test / options.total_batch
        left_s -= evaluation_s
        if left_s < max(self._steps):
            return step
        is_measured = self._n_steps > MEASURED_STEPS or now_s() - self._began_s >= MEASURED_SHARE * self._span_s
        if self._n_steps <= FEWEST_MEASURED or not is_measured:
            return planned
        each_s = step_s + evaluation_s / options.eval_steps + saving_s / options.save_steps
        fit = step + max(1, int(left_s / each_s))
        late = planned - fit > max(1, LATE_SHARE * (planned - step))
        if self._times_laid == 0 or (late and self._times_laid == 1):
            self._times_laid += 1
            return min(planned, fit)
        return planned


def clock_option(options: TrainOptions) -> str:
    """The option that ends the run by the clock, as typed; empty without one."""
    if options.max_hours:
        return f"--max_hours {options.max_hours:g}"
    return f"--finish_by {options.finish_by}" if options.finish_by else ""


def end_by_clock(options: TrainOptions) -> EndByClock | None:
    """The end that the options ask for, counted from now; None without one. Raises ConfigError for one that is over."""
    if options.max_hours:
        return EndByClock(clock_option(options), 3600 * options.max_hours)
    if not options.finish_by:
        return None
    now = datetime.fromtimestamp(now_s())
    end = moment(options.finish_by, now)
    if end is None or end <= now:
        raise ConfigError("--finish_by", f"{options.finish_by} is over: it is {now:%Y-%m-%d %H:%M}")
    return EndByClock(clock_option(options), (end - now) / timedelta(seconds=1))
