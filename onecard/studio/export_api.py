"""Export: a run in other forms, each made by one of the kit's own programs as a job, and what has been made.

The programs write beside their target and rename it once it is whole and reopened; nothing is ever replaced from here.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from onecard.errors import OneCardError
from onecard.export.io.output import new_directory
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.context import StudioContext
from onecard.studio.export_kinds import KINDS, ExportKind, checked_options, server_address
from onecard.studio.failures import last_line, reason_in
from onecard.studio.folders import bytes_in, is_portable
from onecard.studio.http import json_route, language_of, route
from onecard.studio.jobs import ALIVE
from onecard.studio.sources import sources_in
from onecard.studio.use_api import refuse_while_training, source_of, text_of
from onecard.translation import translated

PREFIX = "export-"  # of the kinds of jobs
NAME = re.compile(r"[\w][\w.+-]{0,99}")  # one folder of the output folder, never a path
MOST_SHOWN = 100  # jobs


def routes(context: StudioContext) -> list[BaseRoute]:
    """GET and POST /api/export; the jobs themselves are listed, cancelled and logged at /api/jobs."""
    exports = ExportApi(context)
    return [route("/api/export", exports.shown), json_route("/api/export", exports.start, "kind", "source", status=201)]


class ExportApi:
    """What each path does."""

    def __init__(self, context: StudioContext) -> None:
        self._context, self._starting = context, threading.Lock()

    def shown(self, request: Request) -> dict[str, Any]:
        """What can be exported, in which ways, and what has been, the newest first."""
        to = language_of(request)
        kinds = {name: {"options": kind.options, "writes": kind.writes, "takes": kind.takes,
                        "missing": translated(kind.missing, to)} for name, kind in KINDS.items()}  # fmt: skip
        found = [job for job in self._context.jobs.all() if job["kind"].startswith(PREFIX)]
        jobs = [self.view(job) for job in found[:MOST_SHOWN]]
        sources = list(map(asdict, sources_in(self._context.output_root)))
        return {"kinds": kinds, "jobs": jobs, "sources": sources}

    def start(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """{kind, source, name or url, options?, anyway?}: start a job. 409 where one runs, or the card is in use."""
        kind = KINDS.get(body["kind"]) if isinstance(body["kind"], str) else None
        if kind is None:
            raise bad_request(f"kind is one of {', '.join(KINDS)}", "kind")
        if kind.missing:
            raise ApiError(409, kind.missing, param="kind", code="not_installed")
        source = source_of(self._context, body["source"])
        if source.kind not in kind.takes:
            is_of_adapters = kind.takes == ("adapter",)
            message = f"{source.path} is a whole model, and this takes an adapter"
            raise bad_request(
                message if is_of_adapters else f"{source.path} is an export, and this takes a run", "source"
            )
        options = checked_options(kind, body.get("options", {}))
        if not kind.writes:
            options["url"] = server_address(body.get("url"))
        with self._starting:
            target = self.target_of(body, kind)
            self.refuse_a_second()
            if kind.needs_card and not body.get("anyway"):
                refuse_while_training(self._context)
            words = kind.command(source, self._context.output_root / source.path, target, options)
            about = {"source": source.path, "target": target.name if kind.writes else "", "options": options}
            jobs = replace(self._context.jobs, program=(*self._context.jobs.program[:-1], kind.module))
            job_id = jobs.start(PREFIX + body["kind"], words, title=source.path, about=about)
        return self.view(self._context.jobs.get(job_id))

    def target_of(self, body: dict[str, Any], kind: ExportKind) -> Path:
        """A folder of the output folder that is not there yet. Raises ApiError."""
        root = self._context.output_root
        if not kind.writes:
            return root
        name = text_of(body, "name")
        if not NAME.fullmatch(name) or not is_portable(name):
            raise bad_request("name is that of a new folder: letters, digits, and . _ + - within", "name")
        target = self._context.safe_path(str(root / name), (root,))
        if target.parent != root or target.exists() or target.is_symlink():
            message = f"{name} exists already, and nothing is overwritten; give another name, or delete it first"
            raise ApiError(409, message, param="name", code="exists")
        return target

    def refuse_a_second(self) -> None:
        """Raises ApiError (409) while another export runs: two models in memory are one too many for small machines."""
        running = next((job for job in self._context.jobs.all()
                        if job["kind"].startswith(PREFIX) and job["state"] in ALIVE), None)  # fmt: skip
        if running is not None:
            name = running["about"].get("target") or running["title"]
            raise ApiError(409, f"{name} is being made; wait for its end, or cancel it", code="export_running")

    def view(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job as the page shows it: its last line, why it failed, the size of what it made."""
        log = self._context.jobs.log(job["id"])["text"]
        name = job["about"].get("target", "")
        target = self._context.output_root / name
        is_there = bool(name) and target.is_dir()
        if name and job["state"] == "cancelled":
            tidy(target)
        options = job["about"].get("options", {})
        return {
            "id": job["id"], "name": name or options.get("url", ""), "kind": job["kind"].removeprefix(PREFIX),
            "source": job["title"], "state": job["state"],
            "exit_code": job["exit_code"], "created": job["created"], "ended": job["ended"],
            "command": job["command"], "options": options,
            "line": last_line(log), "error": reason_in(log) if job["state"] == "failed" else "",
            "path": str(target) if is_there else "", "bytes": bytes_in(target) if is_there else None,
        }  # fmt: skip


def tidy(target: Path) -> None:
    """Remove what an export that was ended half-way left behind, as the next start would."""
    if not target.with_name(f".{target.name}.partial").exists():
        return
    with suppress(OneCardError, _NeverMind), new_directory(target):
        raise _NeverMind


class _NeverMind(Exception):
    """Nothing is to be written after all."""
