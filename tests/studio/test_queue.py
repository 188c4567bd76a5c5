"""The queue: what may enter it, its order, and one run after another, of which none is started twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import CheckpointError
from onecard.serve.http_error import ApiError
from onecard.studio import runs_api
from onecard.studio.context import OWN_FOLDER, StudioContext
from onecard.studio.events import Subscriber
from onecard.studio.failures import failure_of, last_error
from onecard.studio.queue import RunQueue
from onecard.studio.runs import Runs
from tests.studio.conftest import STUB, Client, eventually


@pytest.fixture
def queue(context: StudioContext) -> RunQueue:
    return RunQueue(context.output_root / OWN_FOLDER, Runs(context.output_root, context.jobs))


def add(queue: RunQueue, name: str, **options: Any) -> str:
    output = queue.runs.root / name
    words = [f"--output_path={output}", *(f"--{key}={value}" for key, value in options.items())]
    return queue.add(name, words, options, output)


def states(queue: RunQueue) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in queue.listed()["entries"]}


def test_runs_go_one_after_another_and_a_failed_one_keeps_none_back(queue: RunQueue) -> None:
    for name, code in (("a", 0), ("b", 2), ("c", 0)):
        add(queue, name, seed=code, log_steps=1)
    most_at_once = 0

    def over() -> bool:
        nonlocal most_at_once
        queue.tick()
        now = list(states(queue).values())
        most_at_once = max(most_at_once, sum(state in ("starting", "running") for state in now))
        return not set(now) & {"waiting", "starting", "running"}

    eventually(over, "the queue ends")
    assert states(queue) == {"a": "done", "b": "failed", "c": "done"} and most_at_once == 1
    for name in "abc":
        assert (queue.runs.root / name / "starts.txt").read_text().split() == ["started"]


def test_a_run_that_has_stopped_is_resumed_while_its_process_still_ends(
    queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(queue, "a", wandb_project="wait")
    eventually(lambda: queue.tick() or (queue.runs.root / "a" / "log.jsonl").exists(), "it has begun")
    eventually(lambda: states(queue)["a"] == "running", "its process is known")
    with pytest.raises(ApiError, match="waits or goes on"):
        add(queue, "a")
    monkeypatch.setattr(queue.runs, "state", lambda run: ("stopped", {}))
    add(queue, "a")
    with pytest.raises(ApiError, match="waits or goes on"):
        add(queue, "a")
    assert queue.tick() is None and [entry["state"] for entry in queue.listed()["entries"]] == ["running", "waiting"]
    (queue.runs.root / "a" / "go").touch()
    eventually(lambda: queue.tick() or {entry["state"] for entry in queue.listed()["entries"]} == {"done"}, "both end")
    eventually(lambda: [entry["state"] for entry in queue.listed()["entries"]] == ["done", "done"], "both have ended")
    assert (queue.runs.root / "a" / "starts.txt").read_text().split() == ["started", "started"]


def test_the_order_can_be_changed_and_the_queue_held(queue: RunQueue) -> None:
    ids = {name: add(queue, name) for name in "abc"}
    queue.move(ids["c"], -1)
    queue.move(ids["a"], 1)
    assert list(states(queue)) == ["c", "a", "b"]
    queue.move(ids["c"], -1)  # it is the first already
    queue.hold(True)
    assert queue.tick() is None and set(states(queue).values()) == {"waiting"}
    queue.hold(False)
    assert queue.tick() == ids["c"]
    queue.remove(ids["b"])
    assert list(states(queue)) == ["c", "a"]
    for refused in (lambda: queue.move(ids["c"], 1), lambda: queue.remove(ids["c"]), lambda: queue.remove("none")):
        with pytest.raises(Exception, match=r"started|goes on|no such"):
            refused()
    eventually(lambda: states(queue)["c"] == "done", "it ends")
    queue.remove(ids["c"])
    assert list(states(queue)) == ["a"]


def test_two_studios_run_one_queue(queue: RunQueue, context: StudioContext) -> None:
    add(queue, "a")
    other = RunQueue(queue.folder, queue.runs)
    assert queue.tick() is not None
    assert other.tick() is None
    queue.close()
    eventually(lambda: states(other)["a"] == "done", "it ends")
    add(other, "b")
    assert other.tick() is not None


def test_a_broken_queue_is_told_and_kept(queue: RunQueue) -> None:
    (queue.folder / "queue.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="move it away"):
        add(queue, "a")
    assert (queue.folder / "queue.json").read_text(encoding="utf-8") == "{"


def test_options_are_checked_before_they_are_queued(ask: Client, tmp_path: Path) -> None:
    (tmp_path / "data" / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    (tmp_path / "outside.jsonl").write_text("{}", encoding="utf-8")
    bad = {"bits": 5, "lora_r": "two", "datapath": "x", "trust_remote_code": True, "output_path": "/tmp/x",
           "data_path": str(tmp_path / "outside.jsonl"), "reward_file": "x.py"}  # fmt: skip
    status, content = ask("POST", "/api/queue", {"options": bad, "name": "bad"})
    assert status == 400
    problems = dict(content["error"]["problems"])
    assert set(problems) == {f"--{name}" for name in bad}
    assert "did you mean" in problems["--datapath"] and "lies outside" in problems["--data_path"]
    assert ask("GET", "/api/queue")[1]["entries"] == []

    good = {"data_path": "rows.jsonl", "num_epoch": 1, "data": "", "dialogue": False}
    found = ask("POST", "/api/queue/check", {"options": good})[1]
    assert found["problems"] == [] and found["name"].startswith("rows-")
    assert " --output_path=" in found["command"] and "finetune" in found["command"]
    assert f"--data_path={tmp_path / 'data' / 'rows.jsonl'}" in found["command"] and "--num_epoch=1" in found["command"]
    many = {"data_path": ", ".join(["rows.jsonl"] * 600)}  # together longer than a path may be
    assert ask("POST", "/api/queue/check", {"options": many})[0] == 200
    status, content = ask("POST", "/api/queue", {"options": good, "name": "mine"})
    assert status == 201 and content["entries"][0]["state"] == "waiting"
    assert ask("POST", "/api/queue", {"options": good, "name": "mine"})[0] == 409
    for name in ("../x", "a/b", ".x", "", "x" * 200, "a\nb"):
        assert ask("POST", "/api/queue", {"options": good, "name": name})[0] in (400, 201) or not name
        assert not any("/" in entry["name"] or entry["name"].startswith(".")
                       for entry in ask("GET", "/api/queue")[1]["entries"])  # fmt: skip
    for options in ([], "x", None):
        assert ask("POST", "/api/queue", {"options": options})[0] == 400
    assert ask("POST", "/api/queue", {"options": {"prompt_type": ["a", {"b": 1}], "seed": "--debug"}})[0] == 400


def test_every_option_has_its_help_text(ask: Client) -> None:
    options = {one["name"]: one for one in ask("GET", "/api/options")[1]["options"]}
    assert len(options) > 80 and not {"trust_remote_code", "output_path"} & set(options)
    assert all(one["help"] for one in options.values())
    assert options["bits"]["choices"] == ["4", "8", "16", "32"] and options["lora_r"]["kind"] == "whole"


def job(**changes: Any) -> dict[str, Any]:
    return {"state": "failed", "exit_code": 1, **changes}


@pytest.mark.parametrize(
    ("log", "ended", "text", "step"),
    [
        ("x\nerror: no rows\n  in line 5\nbye\n", job(), "no rows\n  in line 5", "log"),
        ("\x1b[31merror:\x1b[0m red\n", job(exit_code=2), "red", "settings"),
        ("error: KeyError: 'x'\nerror: this was not foreseen; run again with --debug\n", job(), "KeyError: 'x'", "log"),
        ("错误: 内存不足\n", job(), "内存不足", "memory"),
        ("step 1\rstep 2\n", job(exit_code=-9), "", "killed"),
        ("last words\n", job(), "last words", "log"),
        ("", job(state="lost", exit_code=None), "", "killed"),
    ],
)
def test_a_failure_is_told_in_words(log: str, ended: dict, text: str, step: str) -> None:
    assert failure_of(ended, log) == (text, step)


def test_what_did_not_fail_has_no_reason() -> None:
    assert failure_of(job(state="done"), "error: x") is None and last_error("fine") == ""
    assert failure_of(job(state="lost"), "", has_checkpoint=True) == ("", "resume_killed")


RUN_STUDIO = """
import sys, time
from pathlib import Path
from onecard.config.studio import StudioOptions
from onecard.studio.context import open_context, OWN_FOLDER
from onecard.studio.queue import RunQueue
from onecard.studio.runs import Runs
context = open_context(StudioOptions(output_root=sys.argv[1]))
context.jobs.program = (sys.executable, sys.argv[2])
queue = RunQueue(context.output_root / OWN_FOLDER, Runs(context.output_root, context.jobs))
while True:
    queue.tick()
    time.sleep(0.01)
"""


def kill_studio_at_random(root: Path, n_kills: int, queue: RunQueue) -> int:
    """Start a process that runs the queue and kill it, again and again, until the queue is over; the kills."""
    import random

    moments, n_done = random.Random(1), 0
    end = time.monotonic() + 240
    while set(states(queue).values()) & {"waiting", "starting", "running"}:
        assert time.monotonic() < end, states(queue)
        studio = subprocess.Popen([sys.executable, "-c", RUN_STUDIO, str(root), str(STUB)])
        if n_done < n_kills:
            time.sleep(moments.uniform(0.2, 1.2))
            studio.kill()
            n_done += 1
        else:
            eventually(lambda: not set(states(queue).values()) & {"waiting", "starting", "running"}, "the queue ends")
            studio.kill()
        studio.wait()
    return n_done


@pytest.mark.skipif(os.name == "nt", reason="kills as POSIX does")
@pytest.mark.parametrize("n_kills", [pytest.param(2, id="few"), pytest.param(20, id="many", marks=pytest.mark.slow)])
def test_a_studio_that_is_killed_loses_nothing_and_starts_nothing_twice(
    queue: RunQueue, n_kills: int, tmp_path: Path
) -> None:
    for name in "abc":
        add(queue, name, log_steps=3 * n_kills)  # so that the queue takes longer than the kills
    n_done = kill_studio_at_random(queue.runs.root, n_kills, queue)
    assert n_done >= (n_kills if n_kills > 2 else 1) and states(queue) == {"a": "done", "b": "done", "c": "done"}
    for name in "abc":
        assert (queue.runs.root / name / "starts.txt").read_text().split() == ["started"], name
    print(f"{n_done} kills: {states(queue)}")


def test_a_studio_killed_between_marking_and_starting_starts_it_later(queue: RunQueue) -> None:
    """The moment that a random kill seldom meets: the queue says started, and no job was written."""
    entry_id = add(queue, "a")
    content = json.loads((queue.folder / "queue.json").read_text(encoding="utf-8"))
    content["entries"][0]["phase"] = "started"
    (queue.folder / "queue.json").write_text(json.dumps(content), encoding="utf-8")
    assert states(queue) == {"a": "starting"}
    queue.tick()
    eventually(lambda: states(queue) == {"a": "done"}, "it is started")
    assert queue.runs.jobs.get(entry_id)["exit_code"] == 0


def test_a_run_that_was_started_elsewhere_is_waited_for(queue: RunQueue) -> None:
    import socket

    other = queue.runs.root / "from-a-terminal"
    other.mkdir()
    (other / "log.jsonl").write_text("", encoding="utf-8")
    (other / ".run.pid").write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    add(queue, "a")
    assert queue.tick() is None and states(queue) == {"a": "waiting"}
    (other / ".run.pid").unlink()
    assert queue.tick() is not None


def test_news_are_told_once(context: StudioContext) -> None:
    routes = runs_api.routes(context)
    context.events._pages.add(Subscriber())
    assert len(routes) > 15
    told = [name for watcher in context.events.watchers for name, _ in watcher()]
    assert told == ["queue"]
    assert [name for watcher in context.events.watchers for name, _ in watcher()] == []
