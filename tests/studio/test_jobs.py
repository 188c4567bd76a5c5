"""Jobs as processes of their own: started once, known again, ended; each state as it can come about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from onecard.serve.http_error import ApiError
from onecard.studio.context import StudioContext
from onecard.studio.jobs import Jobs
from onecard.studio.processes import mark_of, process_of
from onecard.studio.supervisor import PROCESS, supervise
from tests.studio.conftest import Client, eventually


def ended(jobs: Jobs, job_id: str) -> dict:
    return eventually(lambda: (job := jobs.get(job_id))["state"] not in ("starting", "running") and job, job_id)


def test_a_job_runs_and_what_it_said_and_ended_with_is_kept(context: StudioContext, ask: Client) -> None:
    jobs = context.jobs
    good, bad = jobs.start("export", ["say", "好", "0"], title="T", about={"x": 1}), jobs.start("b", ["say", "no", "3"])
    assert ended(jobs, good)["state"] == "done"
    job = ended(jobs, bad)
    assert (job["state"], job["exit_code"], job["kind"]) == ("failed", 3, "b")
    assert ended(jobs, jobs.start("c", ["say", "saved", "143"]))["state"] == "cancelled", "it was asked to stop"
    status, content = ask("GET", f"/api/jobs/{good}/log?after=0")
    assert status == 200 and content["text"].split() == ["好"]
    assert ask("GET", f"/api/jobs/{good}/log?after={content['next']}")[1]["text"] == ""
    assert [one["id"] for one in ask("GET", "/api/jobs?kind=export")[1]["jobs"]] == [good]
    anew = Jobs(jobs.folder)  # as a studio that starts later
    assert anew.get(good)["state"] == "done" and anew.get(good)["about"] == {"x": 1}


def test_a_job_is_started_once_however_often_it_is_asked_for(context: StudioContext, tmp_path: Path) -> None:
    context.jobs.start("a", ["wait", str(tmp_path / "go")], job_id="one")
    for _ in range(3):
        context.jobs.start("a", ["wait", str(tmp_path / "go")], job_id="one")
    eventually(lambda: context.jobs.log("one")["text"].startswith("waiting"), "it runs")
    assert supervise(context.jobs.path("one")) is None, "another process has it"
    (tmp_path / "go").touch()
    assert ended(context.jobs, "one")["state"] == "done"
    assert context.jobs.log("one")["text"].split() == ["waiting"]


def test_a_job_can_be_cancelled_and_one_that_was_killed_is_lost(context: StudioContext, ask: Client, tmp_path) -> None:
    jobs = context.jobs
    for job_id in ("cancelled", "killed"):
        jobs.start("a", ["wait", str(tmp_path / "never")], job_id=job_id)
        eventually(lambda job_id=job_id: jobs.log(job_id)["text"], "it runs")
    assert ask("POST", "/api/jobs/cancelled/cancel")[0] == 200
    assert ended(jobs, "cancelled")["state"] == "cancelled"
    marks = json.loads((jobs.path("killed") / PROCESS).read_text(encoding="utf-8"))
    psutil.Process(marks["supervisor"]["pid"]).kill()
    assert jobs.state("killed") == "running", "the program itself goes on"
    psutil.Process(marks["child"]["pid"]).kill()
    assert eventually(lambda: jobs.get("killed")["state"] != "running" and jobs.get("killed")["state"]) == "lost"


def test_a_claim_that_was_never_written_is_given_up(context: StudioContext) -> None:
    context.jobs.spawn = lambda command: subprocess.Popen([sys.executable, "-c", ""])
    context.jobs.start("a", ["say", "x", "0"], job_id="half")
    claim = context.jobs.path("half") / PROCESS
    claim.touch()
    assert context.jobs.state("half") == "starting"
    os.utime(claim, (time.time() - 100,) * 2)
    assert context.jobs.state("half") == "lost"


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    mark = mark_of(os.getpid())
    assert process_of(mark) is not None
    assert process_of({**mark, "started": mark["started"] - 1000}) is None
    for nothing in (None, {}, {"pid": "1"}, {"pid": 2**60, "started": 0.0}, mark_of(2**22 + 5)):
        assert process_of(nothing) is None


@pytest.mark.parametrize("job_id", ["../x", "", "A", "a/b", "x" * 65, "none"])
def test_what_is_no_job_is_not_found(context: StudioContext, job_id: str) -> None:
    with pytest.raises(ApiError) as refused:
        context.jobs.get(job_id)
    assert refused.value.status_code == 404


def test_the_log_is_cut_between_characters(context: StudioContext) -> None:
    context.jobs.start("a", ["say", "x", "0"], job_id="log")
    ended(context.jobs, "log")
    path = Path(context.jobs.get("log")["log"])
    path.write_bytes("ab好".encode()[:-1])
    assert context.jobs.log("log") == {"text": "ab", "next": 2}
    path.write_bytes("ab好".encode())
    assert context.jobs.log("log", 2) == {"text": "好", "next": 5}
