"""What a run writes down: rows, the curve, and what happens to rows of work that was lost."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
from accelerate import PartialState

from onecard.errors import ConfigError
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train import loop, validation
from onecard.train import memory_probe as rehearsal
from onecard.train import trackers as reporting
from onecard.train.trackers import Reporter, check_trackers, draw_loss, open_trackers, read_log
from tests import tiny
from tests.runs import run_and_stop


def row(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-3}


def test_rows_beyond_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    first = Reporter(tmp_path, total_steps=10, first_step=0)
    for step in range(1, 6):
        first.step(row(step), to_file=True, tokens=8, seconds=0.5)
    first.close()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # a kill in the middle of a line
    second = Reporter(tmp_path, total_steps=10, first_step=3)
    second.step(row(4, loss=9.0), to_file=True, tokens=8, seconds=0.5)
    second.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]


def test_steps_that_are_not_due_are_not_written(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, total_steps=4, first_step=0)
    for step in range(1, 5):
        reporter.step(row(step), to_file=step % 2 == 0, tokens=8, seconds=0.5)
    reporter.close()
    assert [r["step"] for r in read_log(tmp_path)] == [2, 4]


def test_the_speed_is_that_of_the_steps_since_the_last_logged_row(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, total_steps=5, first_step=0)
    for step, (tokens, seconds) in enumerate([(100, 10.0), (100, 1.0), (100, 1.0), (80, 2.0), (20, 0.5)], start=1):
        reporter.step(row(step), to_file=step in (2, 5), tokens=tokens, seconds=seconds)
    reporter.close()
    found = {r["step"]: r["tokens_per_s"] for r in read_log(tmp_path)}
    assert found == {2: round(200 / 11, 1), 5: round(200 / 3.5, 1)}


def test_the_speed_counts_training_alone(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own: no rehearsal, evaluation or checkpoint is in it, and after a resume no earlier step."""
    clock = 0.0
    monkeypatch.setattr(
        loop, "time", SimpleNamespace(monotonic=lambda: clock, time=lambda: clock)
    )  # not the whole process's

    def taking(seconds: float, real: Any) -> Any:
        def slow(*args: Any, **named: Any) -> Any:
            nonlocal clock
            clock += seconds
            return real(*args, **named)

        return slow

    for module, name, seconds in ((loop, "take_step", 2.0), (validation, "evaluate", 500.0), (loop, "save", 300.0),
                                  (rehearsal, "accumulate", 800.0)):  # fmt: skip
        monkeypatch.setattr(module, name, taking(seconds, getattr(module, name)))
    options = {"test_size": 4, "eval_steps": 1, "total_batch": 5, "log_steps": 2, "rehearsal": True, "num_epoch": 2}
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **options, keep_checkpoints=9)
    run_and_stop(config, monkeypatch, after_steps=3)
    rows = [r for r in read_log(finetune(config)) if "loss" in r]
    states = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("checkpoint-*/trainer_state.json")]
    seen = {state["step"]: state["tokens_seen"] for state in states}
    assert {r["step"]: r["tokens_per_s"] for r in rows} == {
        2: round(seen[2] / 4, 1), 4: round((seen[4] - seen[3]) / 2, 1),  # it went on after step 3
        6: round((seen[6] - seen[4]) / 4, 1), 8: round((seen[8] - seen[6]) / 4, 1),
    }  # fmt: skip


def test_an_evaluation_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file a line every half minute, on a terminal a bar; the one loss after them names rows and seconds."""
    clock = 0.0
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=lambda: clock))
    reporter = Reporter(tmp_path, total_steps=4, first_step=0)
    with reporter.evaluation(3) as progress:
        for done in range(10, 101, 10):
            clock += 11
            progress(done, 100)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"step 3: evaluated on {done} of 100 rows" for done in (30, 60, 90)]
    reporter.is_terminal = True
    with reporter.evaluation(3) as progress:
        progress(40, 100)
    shown = capsys.readouterr()
    assert "evaluation" in shown.err and "/100" in shown.err and not shown.out
    with Reporter(tmp_path, total_steps=4, first_step=0, enabled=False).evaluation(3) as progress:
        progress(40, 100)
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_counts_every_row(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    seen: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def watched(reporter: Reporter, step: int) -> Any:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(Reporter, "evaluation", watched)
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", test_size=5, eval_steps=9, micro_batch=2))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert re.search(r"step 3: evaluation loss \S+ \(best so far\), 5 rows in \S+ s\n", capsys.readouterr().out)


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    reporter = Reporter(tmp_path, total_steps=4, first_step=0)
    reporter._log._path = Path("/dev/full")
    reporter.step(row(1), to_file=True, tokens=8, seconds=0.5)
    reporter.step(row(2), to_file=True, tokens=8, seconds=0.5)
    reporter.close()
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_the_curve_is_a_picture_with_both_losses(tmp_path: Path) -> None:
    lines = [row(step, loss=5 / step) for step in range(1, 30)] + [{"step": 29, "eval_loss": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = draw_loss(tmp_path)
    assert picture is not None
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000
    per_token = picture.read_bytes()
    draw_loss(tmp_path, "pair")
    assert picture.read_bytes() != per_token
    assert [objective_named(name).unit for name in ("sft", "dpo")] == ["supervised token", "pair"]


def test_a_single_logged_step_is_seen(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(row(4)) + "\n")
    picture = draw_loss(tmp_path)
    assert picture is not None
    image = matplotlib.image.imread(picture)
    assert (abs(image[..., :3] - [0x9D / 255, 0xB8 / 255, 0xD9 / 255]).max(axis=2) < 0.02).sum() > 30


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, total_steps=4, first_step=0, enabled=False)
    reporter.step(row(1), to_file=True, tokens=8, seconds=0.5)
    reporter.event({"step": 1}, "said")
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb: .*pip install wandb"):
        check_trackers(wandb=True, tensorboard=False)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(tmp_path, total_steps=2, first_step=0)
    reporter.trackers = open_trackers(tmp_path, {}, tensorboard=True, wandb_project=None)
    for step in (1, 2):
        reporter.step(row(step, loss=3.0 / step), to_file=True, tokens=8, seconds=0.5)
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)  # a run's accelerator makes it; accelerate's trackers ask it who writes
    begun: list[dict] = []
    logged: list[tuple[dict, int]] = []
    finished: list[bool] = []

    def init(**settings: Any) -> Any:
        begun.append(settings)
        return SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), finish=lambda: finished.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (1, 2):
        reporter = Reporter(tmp_path, total_steps=2, first_step=step - 1)
        reporter.trackers = open_trackers(tmp_path, {"seed": 7}, tensorboard=False, wandb_project="nights")
        reporter.event({"step": step, "event": "resumed", "eval_loss": 0.5})
        reporter.close()
    assert begun[0] == begun[1] == {
        "project": "nights", "id": (tmp_path / "wandb_id.txt").read_text(), "resume": "allow", "dir": str(tmp_path),
        "config": {"seed": 7},
    }  # fmt: skip
    assert logged == [({"eval_loss": 0.5}, 1), ({"eval_loss": 0.5}, 2)]
    assert len(finished) == 2
