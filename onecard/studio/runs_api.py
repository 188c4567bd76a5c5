"""Runs over HTTP: the table, one run, its curves and answers, what is asked of it while it goes on, and the trash."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from onecard.errors import ConfigError
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.context import OWN_FOLDER, StudioContext
from onecard.studio.events import EventHub, News
from onecard.studio.http import json_route, route
from onecard.studio.jobs_api import whole_number
from onecard.studio.queue import RunQueue
from onecard.studio.queue_api import QueueRoutes
from onecard.studio.run_log import RunLogs, end_of
from onecard.studio.runs import MOST_NOTES, STUDIO_LOG, Runs, is_run, questions, status_of
from onecard.train import control

MOST_RUNS = 50  # in one request
ASK_FIELDS = ("question", "messages", "system", "max_new_tokens", "temperature")
LOG_TAIL = 32_000  # bytes: a browser needs 60 ms to lay out ten times as many, at each new line of a run
# What a page shows of a run changes with these; its output too, which is all that a run gives before its first step.
CHANGE_MARKS = ("log.jsonl", STUDIO_LOG, "studio.json", "control/status.json", "base_comparison.json", "manifest.json",
                ".run.pid")  # fmt: skip


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of runs and of the queue. News: `run`, `gone`, `rows`, `asked`, `queue`."""
    runs = Runs(context.output_root, context.jobs)
    queue = RunQueue(context.output_root / OWN_FOLDER, runs)
    parts = RunRoutes(runs, queue, context.events), QueueRoutes(context, runs, queue)
    context.events.watchers.extend([part.news for part in parts])
    return [route for part in reversed(parts) for route in part.routes()]


class RunRoutes:
    """The handlers of the runs in one folder. `events` tells whether a page is open, which news are for."""

    def __init__(self, runs: Runs, queue: RunQueue, events: EventHub) -> None:
        self.runs, self.queue, self.events, self.logs = runs, queue, events, RunLogs()
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._told: set[str] = set()  # runs of tables that were read since news were looked for

    def routes(self) -> list[BaseRoute]:
        """Those of the table, of one run and of the trash."""
        return [
            route("/api/runs", self.table),
            route("/api/differences", self.differences),
            route("/api/runs/{id}", lambda request: self.runs.details(self._run(request))),
            json_route("/api/runs/{id}", self.change, method="PATCH"),
            route("/api/runs/{id}", self.delete, "DELETE"),
            route("/api/runs/{id}/rows", self.rows),
            route("/api/runs/{id}/log", self.log),
            route("/api/runs/{id}/questions", lambda request: {"questions": questions(self._run(request))}),
            json_route("/api/runs/{id}/control", self.control, "kind", status=202),
            route("/api/runs/{id}/replies/{request}", self.reply),
            route("/api/trash", lambda _: {"trash": self.runs.trash()}),
            route("/api/trash/{number}", self.purge, "DELETE"),
            json_route("/api/trash/{number}/restore", self.restore),
        ]

    def news(self) -> Iterator[News]:
        """`run`: a row that has changed; `gone`: a run that is not there any more; `rows`: what its log grew by."""
        if not self.events.n_pages:  # looking at a hundred runs takes a tenth of a second; a page that opens loads all
            return
        told, self._told = self._told, set()
        found: dict[str, tuple[Any, ...]] = {}
        for run in self.runs.paths():
            run_id = self.runs.id_of(run)
            found[run_id] = (*map(_stamp, (run / name for name in CHANGE_MARKS)), self.runs.state(run)[0])
            if self._seen.get(run_id) == found[run_id]:
                continue
            yield "run", self.runs.row(run)
            for rows in self.logs.news(run):
                yield "rows", {"id": run_id, **rows}
        for run_id in (self._seen.keys() | told) - found.keys():
            yield "gone", {"id": run_id}
        self._seen = found

    def table(self, _: Request) -> dict[str, Any]:
        rows = self.runs.table()
        self._told.update(row["id"] for row in rows)
        return {"runs": rows}

    def differences(self, request: Request) -> dict[str, Any]:
        """The settings in which the runs of `id` (given several times) differ."""
        ids = request.query_params.getlist("id")[:MOST_RUNS]
        found = self.runs.differences([self.runs.path(run_id) for run_id in ids])
        return {"runs": ids, "settings": found}

    def rows(self, request: Request) -> dict[str, Any]:
        """The curves, or what of them lies behind byte `after` of the file `mark`; preview=1: perhaps a few rows."""
        most, after = whole_number(request, "max_points", 2000), whole_number(request, "after")
        mark = request.query_params.get("mark", "")
        preview = self.logs.preview(self._run(request)) if request.query_params.get("preview") == "1" else None
        if preview is not None:
            return preview
        return self.logs.rows(self._run(request), mark=mark, after=after, most=most)

    def log(self, request: Request) -> dict[str, str]:
        """The end of what the run said, as text."""
        return {"text": end_of(self._run(request) / STUDIO_LOG, LOG_TAIL).decode("utf-8", "replace")}

    def change(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Change `notes`, or the `name`, which a run that goes on keeps."""
        run = self._run(request)
        notes = body.get("notes")
        if notes is not None and (not isinstance(notes, str) or len(notes) > MOST_NOTES):
            raise bad_request(f"notes are a text of at most {MOST_NOTES:,} characters", "notes")
        if body.get("name") not in (None, run.name):
            self._not_queued(run)
            run = self.runs.rename(run, body["name"])
        if notes is not None:
            self.runs.note(run, notes=notes)
        return self.runs.details(run)

    def delete(self, request: Request) -> dict[str, str]:
        run = self._run(request)
        self._not_queued(run)
        return {"number": self.runs.delete(run)}

    def _not_queued(self, run: Path) -> None:
        if self.queue.waits_for(run):
            raise ApiError(409, f"{run.name} waits in the queue or goes on; take it out or stop it first")

    def control(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Ask something of a run that goes on: {kind, ...}; gives {request}, whose reply is then asked for."""
        run = self._run(request)
        kind = body.pop("kind")
        if kind not in control.KINDS:
            raise bad_request(f"kind is one of {', '.join(control.KINDS)}", "kind")
        fields = {name: value for name, value in body.items() if kind == "ask" and name in ASK_FIELDS}
        if kind == "ask" and not (fields.get("question") or fields.get("messages")):
            raise bad_request("the question is empty", "question")
        if status_of(run):
            return {"request": control.send(run, kind, **fields)}
        job = self.runs.details(run)["job"]
        if kind == "stop" and isinstance(job, str):  # SIGTERM: it finishes its step and saves
            self.runs.jobs.cancel(job)
            return {"request": None}
        raise ConfigError("", f"{run.name} takes no requests: it has not begun, or an earlier version started it")

    def reply(self, request: Request) -> dict[str, Any]:
        found = control.reply(self._run(request), request.path_params["request"])
        if found is None:
            raise ApiError(404, "there is no such request", code="no_such_request")
        return asdict(found)

    def purge(self, request: Request) -> dict[str, Any]:
        self.runs.purge(request.path_params["number"])
        return {"trash": self.runs.trash()}

    def restore(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.restore(request.path_params["number"])
        return {"id": self.runs.id_of(run) if is_run(run) else None}

    def _run(self, request: Request) -> Path:
        return self.runs.path(request.path_params["id"])


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
