"""The queue over HTTP: check and add a run, put it earlier or later, take it out, hold the queue."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from onecard.errors import ConfigError
from onecard.serve.http_error import bad_request
from onecard.studio.context import StudioContext
from onecard.studio.events import News
from onecard.studio.failures import failure_of
from onecard.studio.http import json_route, route
from onecard.studio.queue import RunQueue
from onecard.studio.run_words import checked_words, command_line, option_help
from onecard.studio.runs import OPTIONS_FILE, Runs, check_name, is_run, newest_position

LOG_TAIL = 64_000  # bytes of output that are looked through for an error


class QueueRoutes:
    """The handlers of one queue."""

    def __init__(self, context: StudioContext, runs: Runs, queue: RunQueue) -> None:
        self.context, self.runs, self.queue = context, runs, queue
        self._seen: Any = None
        self._failures: dict[str, Any] = {}

    def routes(self) -> list[BaseRoute]:
        """GET /api/options, /api/queue; POST /api/queue, /api/queue/check, /api/queue/hold; one entry: DELETE, move."""
        return [
            route("/api/options", lambda _: {"options": option_help()}),
            route("/api/queue", lambda _: self.view()),
            json_route("/api/queue", self.add, "options", status=201),
            json_route("/api/queue/check", self.check, "options"),
            json_route("/api/queue/hold", self.hold, "is_held"),
            route("/api/queue/{id}", self.remove, "DELETE"),
            json_route("/api/queue/{id}/move", self.move, "by"),
            json_route("/api/runs/{id}/resume", self.resume, status=201),
        ]

    def news(self) -> Iterator[News]:
        """Run the queue; `queue` when it has changed."""
        self.queue.tick()
        if not self.context.events.n_pages:
            return
        now = self.view()
        if now != self._seen:
            self._seen = now
            yield "queue", now

    def view(self) -> dict[str, Any]:
        """The queue, each entry with its command and, where it failed, why."""
        found = self.queue.listed()
        for entry in found["entries"]:
            entry["command"] = command_line(entry["words"])
            failure = self._failure(entry)
            entry["failure"] = failure._asdict() if failure else None
        return found

    def _failure(self, entry: dict[str, Any]) -> Any:
        if entry["state"] not in ("failed", "lost"):
            return None
        if entry["id"] not in self._failures:
            self._failures[entry["id"]] = self._read_failure(entry)
        return self._failures[entry["id"]]

    def _read_failure(self, entry: dict[str, Any]) -> Any:
        job = self.context.jobs.get(entry["id"])
        log = self.context.jobs.log(entry["id"], max(0, job["log_bytes"] - LOG_TAIL))["text"]
        return failure_of(job, log, has_checkpoint=bool(newest_position(Path(entry["output"]))))

    def check(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Whether a run could be added: {command, name, problems}."""
        options = given_options(body)
        name = body.get("name") or self.free_name(options)
        try:
            check_name(name)
            words = checked_words(self.context, options, self.context.output_root / name)
        except ConfigError as reason:
            return {"command": None, "name": name, "problems": [list(problem) for problem in reason.problems]}
        return {"command": command_line(words), "name": name, "problems": []}

    def add(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Add a run of `options` under `name`. All that is wrong with them is listed by flag."""
        options = given_options(body)
        name = body.get("name") or self.free_name(options)
        check_name(name)
        output = self.context.output_root / name
        if is_run(output):
            raise ConfigError("--name", f"there is already a run called {name}; choose another name, or resume it")
        words = checked_words(self.context, options, output)
        return {"id": self.queue.add(name, words, options, output), **self.view()}

    def hold(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        self.queue.hold(body["is_held"] is True)
        return self.view()

    def remove(self, request: Request) -> dict[str, Any]:
        self.queue.remove(request.path_params["id"])
        return self.view()

    def move(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        if body["by"] not in (-1, 1):
            raise bad_request("by is 1 or -1", "by")
        self.queue.move(request.path_params["id"], body["by"])
        return self.view()

    def resume(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Add a run that ended early once more: it goes on from its newest checkpoint."""
        run = self.runs.path(request.path_params["id"])
        if self.runs.is_running(run):
            raise ConfigError("--name", f"{run.name} goes on already")
        words = self.runs.details(run)["words"]
        if (run / OPTIONS_FILE).is_file():
            words = [f"--config={run / OPTIONS_FILE}", f"--output_path={run}", "--resume_from_checkpoint=auto"]
        if not isinstance(words, list):
            raise ConfigError("--name", f"nothing in {run.name} tells with which options it was started")
        self.queue.add(run.name, words, {}, run)
        return self.view()

    def free_name(self, options: dict[str, Any]) -> str:
        """A name after data and day that no run has yet."""
        given = options.get("data") or options.get("data_path") or "sample"
        stem = Path(str(given[0] if isinstance(given, list) and given else given)).stem
        start = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', stem).strip('-')[:40] or 'run'}-{time.strftime('%m%d')}"
        numbers = (start if n == 1 else f"{start}-{n}" for n in range(1, 10_000))
        root = self.context.output_root
        taken = {Path(entry["output"]) for entry in self.queue.listed()["entries"]}
        return next(name for name in numbers if not (root / name).exists() and root / name not in taken)


def given_options(body: dict[str, Any]) -> dict[str, Any]:
    """The options of a request: name -> value. Raises ApiError."""
    options = body["options"]
    if not isinstance(options, dict):
        raise bad_request("options must be an object: name without dashes -> value", "options")
    return options
