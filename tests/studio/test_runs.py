"""Runs as files tell them: the table, curves, renaming and trash; what a run that goes on is asked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.config.studio import StudioOptions
from onecard.studio import run_log
from onecard.studio.app import studio_app
from onecard.studio.context import StudioContext
from onecard.studio.events import Subscriber
from onecard.studio.run_log import Column, RunLogs, columns_of, thinned
from onecard.train import control as run_control
from onecard.train.control import Reply, RunStatus
from tests.studio.conftest import Client


class FakeControl:
    """What a run in training would answer."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, dict[str, Any]]] = []
        self.status: RunStatus | None = None

    def send(self, run: Path, kind: str, **given: Any) -> str:
        self.sent.append((run.name, kind, given))
        return "1-a"

    def reply(self, run: Path, request_id: str) -> Reply | None:
        return Reply("done", "42", step=7, seconds=0.5) if request_id == "1-a" else None

    def status_of(self, run: Path) -> RunStatus:
        if self.status is None:
            raise run_control.NotRunning("it wrote no status")
        return self.status


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    fake = FakeControl()
    monkeypatch.setattr(run_control, "send", fake.send)
    monkeypatch.setattr(run_control, "reply", fake.reply)
    monkeypatch.setattr(run_control, "status", fake.status_of)
    return fake


@pytest.fixture
def ask(options: StudioOptions, context: StudioContext, control: FakeControl) -> Client:
    return Client(studio_app(options, context))


def make_run(context: StudioContext, name: str, rows: int = 3, **settings: Any) -> Path:
    run = context.output_root / name
    run.mkdir(parents=True)
    lines = [{"step": k, "loss": 1 / k, "learning_rate": 0.1} for k in range(1, rows + 1)]
    lines.append({"step": rows, "eval_loss": 0.5, "forgetting": 0.01})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = {"model_path": "/models/base-7b", "data_path": "/d/rows.jsonl", "objective": "sft", "bits": 4, **settings}
    (run / "onecard.yaml").write_text("".join(f"{key}: {value}\n" for key, value in options.items()), encoding="utf-8")
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    (run / "trainer_state.json").write_text(json.dumps({"step": rows, "total_steps": rows}), encoding="utf-8")
    return run


def test_the_table_tells_each_run(ask: Client, context: StudioContext) -> None:
    run = make_run(context, "a")
    comparison = {"difference": {"value": -0.2, "low": -0.3, "high": -0.1}, "tuned": [1.0], "mean_base": 2.0}
    (run / "base_comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    stage = make_run(context, "chain/1-first", rows=2)
    (context.output_root / "no run").mkdir()
    rows = {row["id"]: row for row in ask("GET", "/api/runs")[1]["runs"]}
    assert set(rows) == {"a", "chain:1-first"}
    row = rows["a"]
    assert (row["state"], row["step"], row["total"], row["base"], row["data"]) == (
        "ended",
        3,
        3,
        "base-7b",
        "rows.jsonl",
    )
    assert (row["loss"], row["eval_loss"], row["verdict"]) == (pytest.approx(1 / 3), 0.5, "better")
    assert row["size"] == sum(file.stat().st_size for file in run.iterdir()) and row["date"] > 1e9
    details = ask("GET", "/api/runs/chain:1-first")[1]
    assert details["path"] == str(stage) and details["settings"]["bits"] == 4 and len(details["files"]) == 4


def test_broken_files_of_a_run_do_not_hide_the_others(ask: Client, context: StudioContext) -> None:
    make_run(context, "good")
    for name in ("log.jsonl", "onecard.yaml", "manifest.json", "trainer_state.json", "base_comparison.json",
                 "studio.json", "advice.json"):  # fmt: skip
        bad = make_run(context, f"bad-{name.split('.')[0]}")
        (bad / name).write_bytes(b"[1, \xff\x00")
        (bad / "checkpoint-x").mkdir()
    status, content = ask("GET", "/api/runs")
    assert status == 200 and len(content["runs"]) == 8
    for row in content["runs"]:
        assert ask("GET", f"/api/runs/{row['id']}")[0] == 200
        assert ask("GET", f"/api/runs/{row['id']}/rows")[0] == 200


def test_curves_come_whole_and_then_by_what_was_added(ask: Client, context: StudioContext) -> None:
    run = make_run(context, "a")
    first = ask("GET", "/api/runs/a/rows")[1]
    assert first["is_all"] and first["series"]["loss"] == [[1, 2, 3], [1, 0.5, pytest.approx(1 / 3)]]
    assert first["series"]["eval_loss"] == [[3], [0.5]] and first["series"]["forgetting"] == [[3], [0.01]]
    again = f"/api/runs/a/rows?mark={first['mark']}&after={first['next']}"
    assert ask("GET", again)[1]["series"] == {}
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 4, "loss": 0.1}\n{"step": 5, "lo')
    more = ask("GET", again)[1]
    assert not more["is_all"] and more["series"] == {"loss": [[4], [0.1]]}
    (run / "new").write_text('{"step": 1, "loss": 9}\n', encoding="utf-8")
    (run / "new").replace(run / "log.jsonl")  # as a run does that goes on from an earlier step
    anew = ask("GET", f"/api/runs/a/rows?mark={first['mark']}&after={more['next']}")[1]
    assert anew["is_all"] and anew["series"] == {"loss": [[1], [9]]}
    for bad in ("after=-1", "after=x", "max_points=1e9"):
        assert ask("GET", f"/api/runs/a/rows?{bad}")[0] == 400


def test_news_hold_what_was_added(context: StudioContext, ask: Client) -> None:
    run = make_run(context, "a")
    watchers = context.events.watchers

    def news() -> dict[str, Any]:
        """Those of runs and queue."""
        found = {name: content for watcher in watchers for name, content in watcher()}
        return {name: found[name] for name in ("run", "gone", "rows", "queue") if name in found}

    assert news() == {}, "no page is open"
    context.events._pages.add(Subscriber())

    assert set(news()) == {"run", "queue"}
    ask("GET", "/api/runs/a/rows")
    assert news() == {}
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 4, "loss": NaN}\n')
    found = news()
    assert found["run"]["step"] == 4 and found["rows"]["series"] == {"loss": ([4.0], [None])}
    run.rename(run.with_name("b"))
    assert news()["gone"] == {"id": "a"}
    brief = make_run(context, "brief")
    ask("GET", "/api/runs")  # a page shows it, though no news were looked for while it was there
    brief.rename(brief.with_name("c"))
    found = news()
    assert found["gone"] == {"id": "brief"} and found["run"]["id"] == "c"


def test_what_an_answer_took_in_is_told_to_the_pages_that_did_not_ask(context: StudioContext) -> None:
    """Three pages loaded at three lengths of the log; the pieces of the news bring each to its end, once."""
    run, logs = make_run(context, "a", rows=2), RunLogs()
    pages = [logs.rows(run)]
    for step in (3, 4, 5):
        with (run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(f'{{"step": {step}, "loss": 0.1}}\n')
        if step < 5:
            pages.append(logs.rows(run))
    news = logs.news(run)
    for page in pages:
        at, steps = page["next"], list(page["series"]["loss"][0])
        for piece in news:
            if piece["from"] == at and piece["mark"] == page["mark"]:
                at, steps = piece["next"], steps + piece["series"]["loss"][0]
        assert steps == [1, 2, 3, 4, 5]
    assert len(news) == 3 and logs.news(run) == []


def test_the_first_rows_are_told_to_a_page_that_asked_before_there_were_any(context: StudioContext) -> None:
    run, logs = make_run(context, "a"), RunLogs()
    (run / "log.jsonl").rename(run / "later")
    assert logs.rows(run)["mark"] == "" and logs.news(run) == []
    (run / "later").rename(run / "log.jsonl")
    mark = logs.rows(run)["mark"]  # another page
    assert [(piece["mark"], piece["series"]) for piece in logs.news(run)] == [(mark, None)]


@pytest.mark.parametrize("n", [0, 9, 10, 11, 999, 1000, 4567])
def test_thinned_curves_keep_every_peak(n: int) -> None:
    import random

    values = [random.Random(k).random() for k in range(n)]
    for at in range(0, n, 97):
        values[at] = 100.0 + at
    steps, shown = thinned(Column.empty()._replace(steps=list(range(n)), values=values), 200)  # type: ignore[arg-type]
    assert len(steps) <= max(200, 10) and steps == sorted(steps)
    if n:
        assert (steps[0], steps[-1]) == (0, n - 1) and max(shown) == max(values) and min(shown) == min(values)
    assert all(values[int(step)] == value for step, value in zip(steps, shown, strict=True))


def test_gaps_stay_gaps() -> None:
    nan = float("nan")
    steps, shown = thinned(Column.empty()._replace(steps=list(range(300)), values=[nan] * 300), 20)  # type: ignore
    assert 2 <= len(steps) <= 20 and set(shown) == {None}


def test_many_rows_are_read_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": k, "loss": k / 3, "other": {"a": [1]}, **({"eval_loss": 1.0} if k % 7 == 0 else {})}
            for k in range(2000)]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    by_arrow = run_log._columns_by_arrow(lines)
    monkeypatch.setattr(run_log, "ARROW_FROM_BYTES", len(lines))
    assert by_arrow is not None and by_arrow == columns_of(lines) and len(by_arrow["loss"].steps) == 2000
    monkeypatch.undo()
    with_nan = lines + b'{"step": 2000, "loss": NaN}\nno row\n[]\n{"step": "x", "loss": 1}\n'
    assert len(columns_of(with_nan)["loss"].steps) == 2001


def test_a_long_log_is_shown_by_a_few_rows_first(
    ask: Client, context: StudioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(context, "a", rows=5000)
    monkeypatch.setattr(run_log, "PREVIEW_FROM_BYTES", 1000)
    first = ask("GET", "/api/runs/a/rows?preview=1")[1]
    steps = first["series"]["loss"][0]
    assert first["is_preview"] and 250 < len(steps) <= 300 and steps[0] <= 20 and steps == sorted(set(steps))
    assert first["series"]["eval_loss"] == [[5000], [0.5]], "the last row is there"
    whole = ask("GET", "/api/runs/a/rows?max_points=100")[1]
    assert "is_preview" not in whole and whole["series"]["loss"][1][0] == 1 and whole["next"] > 0
    assert "is_preview" not in ask("GET", "/api/runs/a/rows?preview=1")[1], "it is read by now"


def test_a_log_is_shown_by_a_few_rows_while_another_request_reads_it(
    context: StudioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, logs = make_run(context, "a", rows=5000), RunLogs()
    monkeypatch.setattr(run_log, "PREVIEW_FROM_BYTES", 1000)
    logs._logs[run] = run_log.RunLog(run / "log.jsonl")  # as the other request has put it there
    assert (logs.preview(run) or {})["is_preview"]


def test_answers_do_not_grow_with_the_run_and_keep_its_extremes(ask: Client, context: StudioContext) -> None:
    sizes, output = [], "step 1: loss 2.0\n"
    for n in (2_000, 10_000):
        run = make_run(context, f"r{n}", rows=n)
        rows = [{"step": n + k, "loss": {1: 77.5, 2: -55.5}.get(k, 1 / n), "grad_norm": 0.123456789} for k in range(n)]
        with (run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)
        (run / "studio.log").write_text(output * n, encoding="utf-8")
        curves = ask.raw("GET", f"/api/runs/r{n}/rows?max_points=500")
        values = curves.json()["series"]["loss"][1]
        assert max(values) == 77.5 and min(values) == -55.5 and len(values) <= 500
        paths = (f"/api/runs/r{n}", f"/api/runs/r{n}/log", "/api/runs")
        sizes.append([len(curves.content), *(len(ask.raw("GET", path).content) for path in paths)])
        assert ask("GET", f"/api/runs/r{n}/log")[1]["text"].endswith(output)
    assert max(sizes[1]) < 60_000
    assert all(large < 1.3 * small + 1000 for small, large in zip(*sizes, strict=True))


def test_few_logs_are_kept(context: StudioContext) -> None:
    logs = RunLogs(most=2)
    runs = [make_run(context, f"r{k}") for k in range(4)]
    assert all(logs.rows(run)["series"] for run in runs)
    assert logs.news(runs[0]) == [] and len(logs._logs) == 2


def test_names_notes_and_the_trash(ask: Client, context: StudioContext) -> None:
    make_run(context, "a"), make_run(context, "b", bits=8)
    assert ask("PATCH", "/api/runs/a", {"notes": "好 run"})[1]["notes"] == "好 run"
    assert ask("PATCH", "/api/runs/a", {"name": "b"})[0] == 400
    for name in ("../x", "a/b", ".hidden", "x\0", "", " ", "a."):
        assert ask("PATCH", "/api/runs/a", {"name": name})[0] == 400, name
    renamed = ask("PATCH", "/api/runs/a", {"name": "c d-1"})[1]
    assert renamed["id"] == "c d-1" and renamed["notes"] == "好 run"
    assert ask("GET", "/api/runs/a")[0] == 404
    assert ask("GET", "/api/differences?id=b&id=c%20d-1")[1]["settings"] == {"bits": [8, 4]}
    make_run(context, "no-settings")
    (context.output_root / "no-settings" / "onecard.yaml").unlink()
    found = ask("GET", "/api/differences?id=b&id=no-settings&id=c%20d-1")[1]["settings"]
    assert found == {"bits": [8, None, 4]}
    ask("DELETE", "/api/runs/no-settings")
    number = ask("DELETE", "/api/runs/b")[1]["number"]
    assert [row["id"] for row in ask("GET", "/api/runs")[1]["runs"]] == ["c d-1"]
    assert ask("GET", "/api/trash")[1]["trash"][0]["id"] == "b"
    assert ask("POST", f"/api/trash/{number}/restore", {})[1] == {"id": "b"}
    assert [one["id"] for one in ask("GET", "/api/trash")[1]["trash"]] == ["no-settings"] and ask("GET", "/api/runs/b")[
        0
    ] == 200
    number = ask("DELETE", "/api/runs/b")[1]["number"]
    make_run(context, "b")
    assert ask("POST", f"/api/trash/{number}/restore", {})[0] == 400, "the name is taken"
    assert len(ask("DELETE", f"/api/trash/{number}")[1]["trash"]) == 1
    assert ask("DELETE", "/api/trash/..")[0] in (404, 405)


def test_a_run_that_goes_on_keeps_its_folder(ask: Client, context: StudioContext) -> None:
    run = make_run(context, "a")
    (run / ".run.pid").write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    assert ask("GET", "/api/runs/a")[1]["state"] == "training"
    assert ask("PATCH", "/api/runs/a", {"name": "b"})[0] == 409 and ask("DELETE", "/api/runs/a")[0] == 409
    (run / ".run.pid").write_text(f"process 999999999 on {socket.gethostname()}\n", encoding="utf-8")
    assert ask("GET", "/api/runs/a")[1]["state"] == "ended"
    assert ask("PATCH", "/api/runs/a", {"name": "b"})[0] == 200


def test_a_run_is_asked_and_paused(ask: Client, context: StudioContext, control: FakeControl) -> None:
    run = make_run(context, "a")
    assert ask("POST", "/api/runs/a/control", {"kind": "pause"})[0] == 400, "it takes no requests"
    control.status = RunStatus("training", 2, 9)
    row = ask("GET", "/api/runs/a")[1]
    assert (row["state"], row["step"], row["total"]) == ("training", 2, 9)
    assert ask("POST", "/api/runs/a/control", {"kind": "pause", "file": "/etc/passwd"}) == (202, {"request": "1-a"})
    context.jobs.spawn = lambda command: subprocess.Popen([sys.executable, "-c", ""])  # a job that begins later
    context.jobs.start("finetune", [], job_id="later")
    (run / "studio.json").write_text('{"job": "later"}', encoding="utf-8")
    control.status = RunStatus("stopped", 2, 9, process_began=1e9)
    assert ask("GET", "/api/runs/a")[1]["state"] == "starting", "what the earlier start told does not hold"
    control.status = replace(control.status, process_began=time.time())
    assert ask("GET", "/api/runs/a")[1]["state"] == "stopped"
    control.status = replace(control.status, state="training")
    asked = {"kind": "ask", "question": "6 x 7?", "max_new_tokens": 5, "path": "x"}
    assert ask("POST", "/api/runs/a/control", asked)[0] == 202
    assert control.sent == [("a", "pause", {}), ("a", "ask", {"question": "6 x 7?", "max_new_tokens": 5})]
    assert ask("GET", "/api/runs/a/replies/1-a")[1]["text"] == "42" and ask("GET", "/api/runs/a/replies/x")[0] == 404
    for bad in ({"kind": "rm"}, {"kind": "ask"}, {"kind": "ask", "question": ""}, {}):
        assert ask("POST", "/api/runs/a/control", bad)[0] == 400
    row = {"step": 7, "question": "6 x 7?", "answer": "42"}
    (run / "questions.jsonl").write_text(json.dumps(row) + "\nbroken\n", encoding="utf-8")
    assert ask("GET", "/api/runs/a/questions")[1]["questions"] == [row]


def test_a_stopped_run_can_be_resumed(ask: Client, context: StudioContext) -> None:
    make_run(context, "a")
    status, content = ask("POST", "/api/runs/a/resume", {})
    assert status == 201 and content["entries"][0]["words"][0].startswith("--config=")
    assert ask("POST", "/api/runs/a/resume", {})[0] == 409
    assert ask("DELETE", "/api/runs/a")[0] == 409, "it waits in the queue"
    assert ask("POST", "/api/runs/none/resume", {})[0] == 404


@pytest.mark.parametrize("run_id", ["..", ".studio", "a:..", "..:a", "none", "a:b:c", "%2e%2e", "a%2f..%2f.."])
def test_no_id_leads_out_of_the_folder(ask: Client, context: StudioContext, run_id: str) -> None:
    make_run(context, "a")
    assert ask("GET", f"/api/runs/{run_id}/rows")[0] == 404
