"""--finish_by and --max_hours on a clock of the test's own: when a run ends, and how its learning rate is laid."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.config.run import TrainOptions, moment
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.recipes import finetune
from onecard.train import end_by_clock as by_clock
from onecard.train import loop
from onecard.train.end_by_clock import EndByClock, clock_option, end_by_clock
from onecard.train.state import read_state
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import run_and_stop

SPAN_S = 8 * 3600


class Clock:
    """Stands still but when the test lets time pass."""

    def __init__(self) -> None:
        self.s = datetime(2026, 11, 29, 23, 0).timestamp()

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(by_clock, "now_s", found)
    return found


def run_through(clock: Clock, step_s: Callable[[float], float], *, evaluation_s: float, planned: int) -> list[int]:
    """A run without a model: (steps done, total at the end, times laid); time passes as the functions say."""
    options = TrainOptions(total_batch=8, eval_steps=200, save_steps=200)
    end, began_s = EndByClock("--max_hours 8", SPAN_S), clock.s
    step, total, laid, seen_s = 0, planned, 0, 0.0
    while step < total:
        took = step_s((clock.s - began_s) / SPAN_S)
        clock.s += took
        step += 1
        end.step_took(took)
        now = end.total_steps(step, total, options, n_test=100, evaluation_s=seen_s, saving_s=2.0)
        laid += step < now < total
        total = now
        if step == total or step % 200 == 0:
            clock.s += evaluation_s
            seen_s = evaluation_s
            clock.s += 2.0
    return [step, total, laid]


@pytest.mark.parametrize("seed", range(10))
def test_it_is_never_late_on_a_machine_that_slows_at_random(clock: Clock, seed: int) -> None:
    """Noise of a third in every step, and up to three times as slow from a random moment on."""
    draw, began_s = random.Random(seed), clock.s
    slow_from, slow_by = draw.random(), 1 + 2 * draw.random()

    def step_s(share: float) -> float:
        return 10 * draw.uniform(0.7, 1.3) * (slow_by if share > slow_from else 1)

    step, _, laid = run_through(clock, step_s, evaluation_s=draw.uniform(20, 300), planned=100_000)
    span = (clock.s - began_s) / SPAN_S
    assert 0.9 < span <= 1.02
    assert step > 500
    assert laid <= 2


def test_a_steady_machine_lays_the_schedule_once_and_uses_the_time(clock: Clock) -> None:
    began_s = clock.s
    step, total, laid = run_through(clock, lambda share: 10.0, evaluation_s=60.0, planned=100_000)
    assert (step, laid) == (total, 1)
    assert 0.97 < (clock.s - began_s) / SPAN_S <= 1
    assert run_through(clock, lambda share: 10.0, evaluation_s=60.0, planned=50)[:2] == [50, 50]


def test_a_single_step_longer_than_the_time_ends_it(clock: Clock) -> None:
    assert run_through(clock, lambda share: SPAN_S * 0.9, evaluation_s=1.0, planned=9)[:2] == [1, 1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("07:00", (2026, 11, 30, 7, 0)), ("23:30", (2026, 11, 29, 23, 30)), ("7:05", (2026, 11, 30, 7, 5)),
     ("2026-12-24T07:00", (2026, 12, 24, 7, 0)), ("23:00", (2026, 11, 30, 23, 0)), ("25:00", None), ("soon", None)],
)  # fmt: skip
def test_what_a_time_means(text: str, wanted: tuple[int, ...] | None) -> None:
    assert moment(text, datetime(2026, 11, 29, 23, 0)) == (datetime(*wanted) if wanted else None)


def test_bad_ends_are_refused(clock: Clock) -> None:
    with pytest.raises(ConfigError, match=r"--finish_by: 2026-11-29T22:00 is over: it is 2026-11-29 23:00"):
        end_by_clock(TrainOptions(finish_by="2026-11-29T22:00"))
    assert end_by_clock(TrainOptions()) is None
    assert [flag for flag, _ in TrainOptions(finish_by="25:00").problems()] == ["--finish_by"]
    both = TrainOptions(finish_by="07:00", max_hours=2)
    assert [flag for flag, _ in both.problems()] == ["--max_hours"]
    found = end_by_clock(TrainOptions(finish_by="07:00"))
    assert found is not None and found.end_s - clock.s == SPAN_S
    assert clock_option(TrainOptions(max_hours=0.5)) == found.option.replace("finish_by 07:00", "max_hours 0.5")


@pytest.fixture
def slow_steps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each step of a real run takes 100 s of the clock."""
    real = loop.take_step

    def step(*args: Any) -> Any:
        clock.s += 100
        return real(*args)

    monkeypatch.setattr(loop, "take_step", step)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock, time=clock))
    return clock


def test_a_run_ends_by_its_time_and_not_again(
    tiny_base: Path, instructions: Path, tmp_path: Path, slow_steps: Clock, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """20 minutes of steps of 100 s: 11 fit, with the schedule laid over them after the fifth."""

    def config(output: str, **changes: Any) -> FinetuneConfig:
        options = {"total_batch": 4, "num_epoch": 20, "max_hours": 1 / 3, "warmup_steps": 2, "test_size": 4,
                   "eval_steps": 100, "eval_minutes": 0, "save_minutes": 0, **changes}  # fmt: skip
        return tiny.config_for(tiny_base, instructions, tmp_path / output, **options)

    run = finetune(config("run"))
    state = read_state(run)
    assert (state.step, state.total_steps, state.clock) == (11, 11, "--max_hours 0.333333")
    rows = [row for row in read_log(run) if "loss" in row]
    assert "step 6/11" in (printed := capsys.readouterr().out) and "step 5/11" in printed
    rates = [row["learning_rate"] / 1e-2 for row in rows]
    assert rates[5:] == pytest.approx([1 - (step - 2) / 9 for step in range(5, 11)])
    assert [row["total_steps"] for row in read_log(run) if row.get("event") == "schedule"] == [11]
    assert "ended after step 11 by --max_hours" in printed
    assert read_state(finetune(config("run"))).step == 11
    assert read_state(finetune(config("run", max_hours=0.0, max_steps=13))).step == 13

    seldom = finetune(config("seldom", log_steps=100))
    assert [row["step"] for row in read_log(seldom) if "loss" in row] == [11], "the last step is always logged"

    run_and_stop(config("cut"), monkeypatch, after_steps=8)
    slow_steps.s += 9000  # the machine was off
    resumed = read_state(finetune(config("cut")))
    assert (resumed.step, resumed.total_steps) == (11, 11)
    assert tiny.losses_of(tmp_path / "cut") == tiny.losses_of(run)[:11]
