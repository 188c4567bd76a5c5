"""A run that is asked, paused, saved, stopped and given back through its control folder, and ends as undisturbed."""

from __future__ import annotations

import _thread
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.config.run import TrainOptions
from onecard.errors import DataError, Stopped
from onecard.inference.call import GenerateCall
from onecard.recipes import finetune
from onecard.train import asking, control, loop
from onecard.train.control import NotRunning, Reply, RunStatus, reply, send, status
from onecard.train.control_folder import ControlFolder
from onecard.train.end_by_clock import EndByClock
from onecard.train.intervals import Timer
from onecard.train.step_log import QUESTIONS_NAME, read_rows
from tests import tiny
from tests.launching import ended, fail, finish, launch, torchrun
from tests.runs import assert_same_end, run_and_stop

PATIENCE_S = 300.0  # for a run that may share its core with others
OPTIONS = {"total_batch": 4, "num_epoch": 2, "lora_dropout": 0.1, "test_size": 4, "eval_steps": 4}


class Visitor:
    """Sends requests to a run from within its steps, each before the step of its number is begun."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.sent: dict[str, str] = {}
        self.seen: list[str] = []

    def send(self, name: str, kind: str, **given: Any) -> None:
        self.sent[name] = send(self.run, kind, **given)

    def reply(self, name: str) -> Reply:
        found = reply(self.run, self.sent[name])
        assert found is not None
        return found


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Callable[[], object]]]:
    """What is to be done in the middle of a step, by how many were done before it in this start."""
    planned: dict[int, Callable[[], object]] = {}
    real, done = loop.take_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        planned.get(done - 1, lambda: None)()
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "take_step", step)
    yield planned


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    return finetune(tiny.config_for(tiny_base, instructions, folder / "run", **OPTIONS))


def wait_for(run: Path, fits: Callable[[RunStatus], bool]) -> RunStatus:
    deadline = time.monotonic() + PATIENCE_S
    while not fits(found := status(run)):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_questions_change_no_bit_of_the_run(
    tiny_base: Path, instructions: Path, tmp_path: Path, undisturbed: Path, at_step: dict[int, Any]
) -> None:
    visitor = Visitor(tmp_path / "run")
    at_step[1] = lambda: visitor.send("greedy", "ask", question="Say hello", max_new_tokens=8)
    at_step[4] = lambda: visitor.send("drawn", "ask", question="Say hello", max_new_tokens=8, temperature=1.0, seed=3)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And?"}]  # fmt: skip
    at_step[7] = lambda: visitor.send("beams", "ask", messages=talk, max_new_tokens=4, num_beams=3)
    at_step[8] = lambda: visitor.send("state", "save")
    run = finetune(tiny.config_for(tiny_base, instructions, visitor.run, **OPTIONS))
    assert_same_end(undisturbed, run)
    replies = {name: visitor.reply(name) for name in visitor.sent}
    assert {name: each.state for name, each in replies.items()} == dict.fromkeys(visitor.sent, "done")
    assert {name: each.step for name, each in replies.items()} == {"greedy": 2, "drawn": 5, "beams": 8, "state": 9}
    assert replies["state"].text == "checkpoint-9 is saved"
    rows = list(read_rows(run / QUESTIONS_NAME))
    assert [(row["step"], row["question"], row["answer"]) for row in rows] == [
        (2, "Say hello", replies["greedy"].text), (5, "Say hello", replies["drawn"].text),
        (8, "And?", replies["beams"].text),
    ]  # fmt: skip
    assert rows[1]["settings"]["temperature"] == 1.0 and rows[2]["messages"] == talk
    assert status(run).state == "ended" and status(run).step == 10


def test_a_run_waits_answers_and_leaves_its_card_and_ends_as_undisturbed(
    tiny_base: Path, instructions: Path, tmp_path: Path, undisturbed: Path, at_step: dict[int, Any]
) -> None:
    """Paused, asked meanwhile, asked what cannot be, given back, and told to go on, by another thread."""
    visitor, failures = Visitor(tmp_path / "run"), list[BaseException]()

    def visit() -> None:
        paused = wait_for(visitor.run, lambda now: now.state == "paused")
        assert (paused.step, paused.total_steps) == (3, 10)
        visitor.send("while paused", "ask", question="Say hello", max_new_tokens=4)
        visitor.send("unknown", "ask", question="Say hello", max_tokens=4)
        visitor.send("long", "ask", question="Say hello " * 900)
        visitor.send("wrong", "ask", question="Say hello", temperature="hot")
        visitor.send("give back", "give_back")
        wait_for(visitor.run, lambda now: now.state == "given_back")
        visitor.send("away", "ask", question="Say hello")
        visitor.send("take back", "take_back")
        wait_for(visitor.run, lambda now: now.state == "paused")
        assert status(visitor.run).step == 3
        visitor.send("continue", "continue")
        visitor.send("again", "continue")

    def guarded() -> None:
        try:
            visit()
        except BaseException as reason:
            failures.append(reason)
            send(visitor.run, "stop")

    thread = threading.Thread(target=guarded)
    at_step[2] = lambda: (visitor.send("pause", "pause"), thread.start())
    run = finetune(tiny.config_for(tiny_base, instructions, visitor.run, **OPTIONS))
    thread.join()
    assert not failures
    assert_same_end(undisturbed, run)
    said = {name: (found.state, found.text or found.error) for name in visitor.sent if (found := visitor.reply(name))}
    assert said["pause"] == ("done", "paused after step 3 of 10")
    assert said["while paused"][0] == "done"
    assert said["unknown"] == ("failed", "a question has no max_tokens")
    assert said["long"][0] == "failed" and "the model reads at most 512" in said["long"][1]
    assert said["wrong"] == ("failed", "temperature: 'hot' is no float")
    assert said["give back"][0] == "done" and "there is no card to give back" in said["give back"][1]
    assert said["away"][0] == "failed" and "has left its card" in said["away"][1]
    assert said["take back"] == ("done", "back on the card, and paused at step 3")
    assert said["continue"] == ("done", "goes on after step 3 of 10")
    assert said["again"] == ("done", "the run was not waiting")
    assert len(list(read_rows(run / QUESTIONS_NAME))) == 1


@pytest.mark.parametrize("way", [pytest.param("request", marks=pytest.mark.slow), "signal"])
def test_a_run_that_waits_can_be_stopped_and_goes_on_from_there(
    tiny_base: Path, instructions: Path, tmp_path: Path, undisturbed: Path, at_step: dict[int, Any], way: str
) -> None:
    visitor = Visitor(tmp_path / "run")
    config = tiny.config_for(tiny_base, instructions, visitor.run, **{**OPTIONS, "save_steps": 100})

    def visit() -> None:
        wait_for(visitor.run, lambda now: now.state == "paused")
        if way == "request":
            visitor.send("stop", "stop")
        else:
            _thread.interrupt_main(signal.SIGINT)

    thread = threading.Thread(target=visit)
    at_step[1] = lambda: (visitor.send("pause", "pause"), thread.start())
    with pytest.raises(Stopped, match="after step 2 of 10; checkpoint-2 is saved") as stopped:
        finetune(config)
    thread.join()
    assert stopped.value.exit_code == (143 if way == "request" else 130)
    assert status(visitor.run).state == "stopped"
    with pytest.raises(NotRunning, match="takes no requests: stopped, step 2 of 10: stopped by"):
        send(visitor.run, "pause")
    assert_same_end(undisturbed, finetune(config))


def test_a_stop_in_the_middle_of_an_answer_cuts_it(
    tiny_base: Path, instructions: Path, tmp_path: Path, at_step: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer itself sends the stop, as soon as its first tokens are told."""
    visitor = Visitor(tmp_path / "run")
    real = ControlFolder.answer

    def answer(folder: ControlFolder, request: Any, told: Reply) -> None:
        real(folder, request, told)
        if told.state == "running" and "stop" not in visitor.sent:
            visitor.send("stop", "stop")

    monkeypatch.setattr(ControlFolder, "answer", answer)
    at_step[0] = lambda: visitor.send("long", "ask", question="Say hello", max_new_tokens=400, min_new_tokens=400)
    with pytest.raises(Stopped, match="stopped by a request after step 1"):
        finetune(tiny.config_for(tiny_base, instructions, visitor.run, **OPTIONS))
    (row,) = read_rows(visitor.run / QUESTIONS_NAME)
    assert row["finish_reason"] == "cancelled" and visitor.reply("long").state == "done"


def test_memory_that_runs_out_while_answering_ends_nothing(
    tiny_base: Path, instructions: Path, tmp_path: Path, undisturbed: Path, at_step: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And neither does an error that nobody foresaw."""
    visitor = Visitor(tmp_path / "run")
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), ZeroDivisionError("of a template")])

    def fail(*_: Any, **__: Any) -> Any:
        raise next(errors)

    monkeypatch.setattr(GenerateCall, "_generate", fail)
    at_step[1] = lambda: visitor.send("large", "ask", question="Say hello")
    at_step[3] = lambda: visitor.send("odd", "ask", question="Say hello")
    run = finetune(tiny.config_for(tiny_base, instructions, visitor.run, **OPTIONS))
    assert_same_end(undisturbed, run)
    large, odd = visitor.reply("large"), visitor.reply("odd")
    assert large.state == odd.state == "failed"
    assert "out of memory while answering; training goes on" in large.error and "max_new_tokens" in large.error
    assert odd.error == "ZeroDivisionError: of a template"
    assert not (run / QUESTIONS_NAME).exists()


def test_a_start_that_fails_leaves_no_control_folder(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError):
        finetune(tiny.config_for(tiny_base, tmp_path / "none.json", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def own_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_number_format")
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_twenty_questions_at_random_moments(
    tiny_base: Path, instructions: Path, tmp_path: Path, at_step: dict[int, Any], bits: int
) -> None:
    """Each is answered behind the step in which it came; how long that took is printed."""
    options = {**OPTIONS, "num_epoch": 8, "bits": bits, "gradient_checkpointing": True, "max_hours": 9.0}
    undisturbed = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed", **options))
    visitor, drawn, sent_s = Visitor(tmp_path / "run"), random.Random(bits), dict[str, float]()
    at_step.clear()
    n_before = 40  # steps of the run above

    def ask(step: int) -> None:
        sent_s[str(step)] = time.time()
        visitor.send(str(step), "ask", question=f"Count to {step}", max_new_tokens=8, temperature=step % 2, seed=step)

    moments = sorted(drawn.sample(range(39), 20))
    for step in moments:
        at_step[n_before + step] = partial(ask, step)
    run = finetune(tiny.config_for(tiny_base, instructions, visitor.run, **options))
    assert_same_end(undisturbed, run)
    replies = {step: visitor.reply(str(step)) for step in moments}
    assert {step: (each.state, each.step) for step, each in replies.items()} == {
        step: ("done", step + 1) for step in moments
    }
    written = {step: (run / control.FOLDER / f"{visitor.sent[str(step)]}{control.REPLY}").stat() for step in moments}
    took_s = [written[step].st_mtime - sent_s[str(step)] for step in moments]
    print(f"{bits} bits: answered after {min(took_s):.2f} to {max(took_s):.2f} s, the rest of the step included")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_answer_wait_stop_and_stay_on_their_cards(
    tiny_base: Path, instructions: Path, tmp_path: Path, shard: bool
) -> None:
    """With the layers divided between them no one can answer alone, and that is said."""
    options = {**OPTIONS, "num_epoch": 4, "save_steps": 100} | ({"shard": True} if shard else {"ask": ["Say hello"]})
    runs = [tmp_path / name / "run" for name in ("undisturbed", "disturbed")]
    config = tiny.config_for(tiny_base, instructions, runs[1], **options)
    finish(launch(torchrun(2), tiny.config_for(tiny_base, instructions, runs[0], **options), tmp_path / "undisturbed"))
    visitor = Visitor(runs[1])
    with ended(launch(torchrun(2), config, tmp_path / "one")) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (visitor.run / control.FOLDER / control.STATUS_NAME).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        visitor.send("pause", "pause")
        paused = wait_for(visitor.run, lambda now: now.state == "paused").step
        visitor.send("ask", "ask", question="Say hello", max_new_tokens=4)
        visitor.send("give back", "give_back")
        visitor.send("save", "save")
        visitor.send("stop", "stop")
        assert f"stopped by a request after step {paused} of 20; checkpoint-{paused} is saved" in fail(process)
    said = {name: visitor.reply(name) for name in visitor.sent}
    assert {said[name].state for name in ("pause", "save", "stop")} == {"done"}
    assert said["save"].text == f"checkpoint-{paused} is saved"
    assert "of several processes" in said["give back"].error
    assert "--shard: an answer would need all processes at once" in said["ask"].error if shard else said["ask"].text

    with ended(launch(torchrun(2), config, tmp_path / "two")) as process:
        wait_for(visitor.run, lambda now: now.is_alive)
        visitor.send("wait", "pause")
        assert wait_for(visitor.run, lambda now: now.state == "paused").step > paused
        visitor.send("continue", "continue")
        finish(process)
    assert_same_end(*runs)
    if not shard:
        rows = [row["step"] for row in read_rows(visitor.run / QUESTIONS_NAME)]
        assert rows == sorted([0, *range(4, 21, 4), paused])


@pytest.mark.slow  # that they are asked at each evaluation is test_changed_options.py's, too
def test_standing_questions_make_a_film_strip(
    tiny_base: Path, instructions: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step and at each evaluation; a run that is cut and goes on has each frame once."""
    monkeypatch.setattr(asking, "STANDING_TOKENS", 4)
    (tmp_path / "questions.txt").write_text("Count to 3\nSay hello\n", encoding="utf-8")
    asked = {"ask": ["Translate"], "ask_file": str(tmp_path / "questions.txt"), "save_steps": 100}
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **OPTIONS | asked)
    run_and_stop(config, monkeypatch, after_steps=5)
    run = finetune(config)
    assert_same_end(undisturbed, run)
    rows = [(row["step"], row["question"]) for row in read_rows(run / QUESTIONS_NAME)]
    assert rows == [(step, text) for step in (0, 4, 8, 10) for text in ("Translate", "Count to 3", "Say hello")]


@pytest.mark.parametrize("changes", [{"shard": True}, {"deepspeed": "zero.json"}, {"objective": "reward"}])
def test_standing_questions_are_refused_where_nobody_answers(changes: dict[str, Any]) -> None:
    problems = TrainOptions(ask=["Say hello"], **changes).problems()
    assert [flag for flag, text in problems if "cannot answer" in text] == ["--ask"]
    assert not [flag for flag, _ in TrainOptions(**changes).problems() if flag == "--ask"]
    assert [flag for flag, _ in TrainOptions(ask=[" "]).problems()] == ["--ask"]


def test_time_that_a_run_waits_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("onecard.train.end_by_clock.now_s", lambda: now[0])
    for option, later in (("--max_hours 1", 600), ("--finish_by 07:00", 0)):
        clock = EndByClock(option, 3600)
        end, spent = clock.end_s, clock.spent_s
        now[0] += 600
        clock.waited(600)
        assert (clock.end_s - end, clock.spent_s - spent) == (later, 0)
    timer = Timer(1)
    timer.put_off(10**9)
    assert not timer.is_due()
