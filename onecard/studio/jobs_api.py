"""Jobs over HTTP: the list, one with its output, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.context import StudioContext
from onecard.studio.events import News
from onecard.studio.http import route
from onecard.studio.jobs import ALIVE, Jobs


def routes(context: StudioContext) -> list[BaseRoute]:
    """GET /api/jobs, /api/jobs/ID, /api/jobs/ID/log?after=BYTE; POST /api/jobs/ID/cancel. News: `job`."""
    jobs = context.jobs
    context.events.watchers.append(JobWatcher(jobs).news)

    def cancel(request: Request) -> dict[str, Any]:
        jobs.cancel(request.path_params["id"])
        return jobs.get(request.path_params["id"])

    return [
        route("/api/jobs", lambda request: {"jobs": jobs.all(request.query_params.get("kind", ""))}),
        route("/api/jobs/{id}", lambda request: jobs.get(request.path_params["id"])),
        route("/api/jobs/{id}/log", lambda r: jobs.log(r.path_params["id"], whole_number(r, "after"))),
        route("/api/jobs/{id}/cancel", cancel, "POST"),
    ]


class JobWatcher:
    """Tells of jobs whose state or output has changed; those that have ended are looked at once."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._seen: dict[str, tuple[str, int]] = {}

    def news(self) -> Iterator[News]:
        """`job`: the job, as GET /api/jobs/ID has it."""
        folder = self._jobs.folder
        for name in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ():
            if name in self._seen and self._seen[name][0] not in ALIVE:
                continue
            try:
                job = self._jobs.get(name)
            except (ApiError, OSError, KeyError, ValueError):
                continue
            now = (job["state"], job["log_bytes"])
            if self._seen.get(name) != now:
                self._seen[name] = now
                yield "job", job


def whole_number(request: Request, name: str, default: int = 0) -> int:
    """A number of the query that is not negative. Raises ApiError."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise bad_request(f"{name} is not a whole number of 0 or more", name)
    return int(text)
