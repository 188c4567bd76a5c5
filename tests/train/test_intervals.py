"""When a run evaluates and saves: enough of it in a small one, by the clock in a slow one, and never to its harm."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.batches import auto_test_size
from onecard.recipes import finetune
from onecard.train import intervals, loop
from onecard.train import memory_probe as rehearsal
from onecard.train.auto_config import auto_total_batch, useless_settings
from onecard.train.intervals import Timer, resolve_intervals
from onecard.train.loop import total_steps
from onecard.train.state import TrainerState
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import assert_same_end, final_checkpoint


def resolved(n_rows: int, *, n_test: int = 0, **typed: float) -> tuple[TrainOptions, int]:
    """The options of a run over `n_rows` training rows, at the defaults but for `typed`, and its steps."""
    options = replace(TrainOptions(total_batch=auto_total_batch(n_rows)), **typed)
    total = total_steps(options, n_rows)
    return resolve_intervals(options, n_rows, n_test, total), total


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 100_000), st.sampled_from([1, 2, 3, 10]))
def test_a_run_of_any_size_is_evaluated_three_times_and_killed_at_half_has_most_of_it(n_rows: int, epochs: int) -> None:
    options, total = resolved(n_rows, num_epoch=epochs)
    evaluations = {*range(options.eval_steps, total + 1, options.eval_steps), total}
    assert len(evaluations) >= min(3, total)
    half = total // 2
    saved = half // options.save_steps * options.save_steps
    assert half - saved <= max(half / 4, options.save_steps == 1)
    per_epoch = -(-n_rows // options.total_batch)
    assert max(options.eval_steps, options.save_steps) <= min(200, per_epoch)


def test_examples() -> None:
    """38, 258 and 1,900 rows to train on are left of 40, 272 and 2,000."""
    found = [resolved(n) for n in (38, 258, 1900)]
    assert [(options.total_batch, total) for options, total in found] == [(4, 30), (4, 195), (8, 714)]
    assert [(options.eval_steps, options.save_steps) for options, _ in found] == [(10, 3), (65, 24), (200, 89)]


@settings(max_examples=300, deadline=None)
@given(st.integers(20, 1_000_000), st.sampled_from([1, 2, 3, 10]), st.sampled_from(["auto", 0.05, 0.5, 5000]))
def test_evaluation_takes_a_tenth_of_the_time_at_most(n: int, epochs: int, test_size: float | str) -> None:
    """Whatever was held out, where --eval_steps is chosen; the first row of time is a training row's."""
    size: Any = auto_test_size(n) if test_size == "auto" else test_size
    n_test = min(n - 1, int(size) if size >= 1 else max(1, round(size * n)))
    options, total = resolved(n - n_test, n_test=n_test, num_epoch=epochs)
    evaluated = total // options.eval_steps * 0.5 * n_test
    assert options.eval_steps == total or evaluated <= 0.1 * (evaluated + total * options.total_batch) + 1e-9
    if test_size == "auto":
        assert n_test <= 1000
        assert -(-total // options.eval_steps) >= 3


def test_the_estimate_counts_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of 60 s; an evaluation of 120 s after every 40 and after the last: 3 of them, and by the clock more."""
    run = SimpleNamespace(state=TrainerState(step=0, total_steps=100), accelerator=SimpleNamespace(num_processes=1))
    monkeypatch.setattr(rehearsal, "_tokens_left", lambda run: 6000.0)
    for eval_minutes, told in ((0, "at most about 1.8 hours, 6 min of it for evaluation"),
                               (50, "at most about 1.8 hours, 10 min of it for evaluation"),
                               (1, "at most about 2.0 hours, 17 min of it for evaluation")):  # fmt: skip
        run.options = TrainOptions(eval_steps=40, eval_minutes=eval_minutes)
        assert rehearsal._duration(run, 1.0, evaluation_s=120.0).endswith(told)
    assert rehearsal._duration(run, 1.0, evaluation_s=0.0).endswith("at most about 1.7 hours")


def test_typed_values_win() -> None:
    options, _ = resolved(272, eval_steps=7, save_steps=500)
    assert (options.eval_steps, options.save_steps) == (7, 500)


SLOW = pytest.mark.slow


class Killed(BaseException):
    """What no handler of the run catches, as a kill."""


@pytest.mark.parametrize("n_rows", [40, pytest.param(272, marks=SLOW), pytest.param(2000, marks=SLOW)])
def test_a_small_run_at_the_defaults_killed_at_half_has_lost_a_quarter_at_most(
    n_rows: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_instructions(tmp_path / "data.json", n=n_rows)
    config = tiny.with_options(FinetuneConfig(), {
        "model_path": str(tiny_base), "bits": 32, "device": "cpu", "data_path": str(data), "prompt_type": "alpaca",
        "cache_path": str(tmp_path / "cache"), "output_path": str(tmp_path / "run"), "final_weights": "best",
    })  # fmt: skip
    real = loop.take_step

    def killed_at_half(run, *args):
        if run.state.step == run.state.total_steps // 2:
            raise Killed
        return real(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", killed_at_half)
        with pytest.raises(Killed):
            finetune(config)
    saved = json.loads((final_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    assert saved["step"] >= 0.75 * (saved["total_steps"] // 2)
    rows = read_log(finetune(config))
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert len(evaluations) >= 3
    best = min(evaluations, key=lambda step: evaluations[step])
    published = [tiny.tensors_of(path / "adapter_model.safetensors")
                 for path in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")]  # fmt: skip
    assert tiny.same_tensors(*published)


def test_the_clock_saves_and_evaluates_and_changes_nothing(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that takes six minutes on a clock of our own: every second one is saved and evaluated."""
    monkeypatch.setattr(intervals, "time", SimpleNamespace(monotonic=lambda: clock))  # not the whole process's
    clock, real = 0.0, loop.take_step

    def slow(run, requested):
        nonlocal clock
        clock += 360
        return real(run, requested)

    options = {"test_size": 4, "total_batch": 4, "save_steps": 100, "eval_steps": 100, "num_epoch": 1.2,
               "lora_dropout": 0.1, "keep_checkpoints": 9}  # fmt: skip
    never = {"eval_minutes": 0, "save_minutes": 0}
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "1" / "run", **options, **never))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", slow)
        run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "2" / "run", **options))
    assert [row["step"] for row in read_log(run) if "eval_loss" in row] == [2, 4, 6]
    assert {path.name for path in run.glob("checkpoint-*")} >= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert [path.name for path in (tmp_path / "1" / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert_same_end(tmp_path / "1" / "run", run)


def test_what_takes_long_is_done_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of five minutes is due again after 45, not after 10."""
    clock = 0.0
    monkeypatch.setattr(intervals, "time", SimpleNamespace(monotonic=lambda: clock))  # not the whole process's
    timer, never = Timer(10), Timer(0)
    due = []
    for minute in range(70):
        clock = 60.0 * minute
        if timer.is_due():
            due.append(minute)

            def evaluate() -> str:
                nonlocal clock
                clock += 300
                return "done"

            assert timer.timed(evaluate) == "done"
        assert not never.is_due()
    assert due == [10, 60]


@pytest.mark.parametrize(("typed", "flag", "words"), [
    ({"total_batch": 64}, "--total_batch", r"64 is more than the 38 training rows.* 4 would be chosen"),
    ({"warmup_steps": 100}, "--warmup_steps", r"rises for 100 steps, but the run has 30: .* reaches 30%"),
    ({"warmup_ratio": 0.999}, "--warmup_ratio", r"rises for 30 steps"),
    ({"eval_steps": 31}, "--eval_steps", "31 is more than the 30 steps"),
    ({"save_steps": 200}, "--save_steps", "200 is more than the 30 steps"),
])  # fmt: skip
def test_settings_that_are_larger_than_the_run_are_reported(typed: dict, flag: str, words: str) -> None:
    options = replace(TrainOptions(total_batch=4), **typed)
    found = useless_settings(options, 38, 2, total_steps(options, 38))
    assert [name for name, _ in found] == [flag]
    assert re.search(words, found[0][1])


def test_settings_that_do_what_they_say_are_not_reported() -> None:
    assert useless_settings(TrainOptions(total_batch=4, save_steps=30, eval_steps=30), 38, 2, 30) == []
    assert useless_settings(TrainOptions(total_batch=4, eval_steps=99), 38, 0, 30) == []
    best = useless_settings(TrainOptions(total_batch=4, final_weights="best"), 38, 0, 30)
    assert [flag for flag, _ in best] == ["--final_weights"]
