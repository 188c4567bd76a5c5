"""Jobs: programs of this kit that the studio starts, each a process of its own whose state lies in files.

JOBS/ID/ holds job.json (what to run), process.json (who runs it), log.txt and exit.json. A studio that starts anew
reads them; nothing else is remembered.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from onecard.serve.http_error import ApiError
from onecard.storage import read_json_object, write_whole
from onecard.studio.processes import process_of, start_apart
from onecard.studio.supervisor import EXIT, LOG, PROCESS, SPEC

CANCELLED = "cancelled"  # a file: the end that follows was wanted
ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")
CLAIM_S = 30.0  # a claim without content after so long is that of a process that was killed while it wrote it
MOST_LOG_BYTES = 256_000  # sent at once
ALIVE = ("starting", "running")
STOPPED = (130, 143)  # exit codes of a run that was asked to stop and has saved itself (onecard/errors.py)


@dataclass
class Jobs:
    """The jobs of a folder. `program` stands before the words of each: `python -m onecard`."""

    folder: Path
    program: tuple[str, ...] = (sys.executable, "-m", "onecard")
    spawn: Callable[[Sequence[str]], subprocess.Popen[bytes]] = start_apart
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, kind: str, words: Sequence[str], *, title: str = "", job_id: str = "", log: Path | None = None,
        about: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """Write down and start a job of these words, such as ["merge", "--lora_path", ...]; its id.

        job_id: given again, a job that was written down and not started is started, and one that was is left alone.
        log: where its output goes instead of its folder. about: kept beside it for who lists it (a result's path).
        """
        job_id = job_id or new_id()
        folder = self.path(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SPEC).exists():
            spec = {
                "id": job_id, "kind": kind, "title": title, "command": [*self.program, *words], "cwd": str(Path.cwd()),
                "log": str(log or folder / LOG), "created": time.time(), "about": about or {},
            }  # fmt: skip
            write_whole(folder / SPEC, json.dumps(spec, ensure_ascii=False, indent=1))
        if not (folder / PROCESS).exists():
            self._started.append(self.spawn([sys.executable, "-m", "onecard.studio.supervisor", str(folder)]))
        return job_id

    def path(self, job_id: str) -> Path:
        """The folder of a job. Raises ApiError (404) for what is no id."""
        if not isinstance(job_id, str) or not ID.fullmatch(job_id):
            raise ApiError(404, "there is no such job", code="no_such_job")
        return self.folder / job_id

    def get(self, job_id: str) -> dict[str, Any]:
        """What is known of a job: its spec, `state`, `exit_code`, `ended`, `log_bytes`. Raises ApiError (404).

        state: starting, running, done, failed, cancelled, or lost: it was killed and nobody saw its end.
        """
        self._reap()
        folder = self.path(job_id)
        spec = read_json_object(folder / SPEC)
        if not spec:
            raise ApiError(404, "there is no such job", code="no_such_job")
        state = self.state(job_id)
        ended = read_json_object(folder / EXIT) if state not in ALIVE else {}
        log = Path(spec["log"])
        return {**spec, "state": state, "exit_code": ended.get("code"), "ended": ended.get("ended"),
                "log_bytes": log.stat().st_size if log.is_file() else 0}  # fmt: skip

    def state(self, job_id: str) -> str:
        """See `get`."""
        folder = self.path(job_id)
        if not (folder / PROCESS).exists():
            return "starting"
        marks = read_json_object(folder / PROCESS)
        if any(process_of(mark) for mark in marks.values()):
            return "running"
        # In this order: a process that ended between the two questions has left its code.
        ended = read_json_object(folder / EXIT)
        if ended:
            is_wanted = ended["code"] in STOPPED or (folder / CANCELLED).exists()
            return "done" if ended["code"] == 0 else CANCELLED if is_wanted else "failed"
        with suppress(OSError):
            if not marks and time.time() - (folder / PROCESS).stat().st_mtime < CLAIM_S:
                return "starting"
        return "lost"

    def all(self, kind: str = "") -> list[dict[str, Any]]:
        """All jobs, or those of a kind, the newest first."""
        found = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            with suppress(ApiError, OSError, KeyError):
                found.append(self.get(folder.name))
        return sorted((one for one in found if kind in ("", one["kind"])), key=lambda one: -one["created"])

    def log(self, job_id: str, after: int = 0) -> dict[str, Any]:
        """The output from a byte on: {text, next}; of what is longer than `MOST_LOG_BYTES` the end."""
        path = Path(self.get(job_id)["log"])
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                start = max(0, min(after, size), size - MOST_LOG_BYTES)
                stream.seek(start)
                data = stream.read(size - start)
        except OSError:
            return {"text": "", "next": 0}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        n_waiting = len(decoder.getstate()[0])  # of a character whose end comes with the next piece
        return {"text": text, "next": start + len(data) - n_waiting}

    def cancel(self, job_id: str) -> None:
        """Ask the job's process to end (SIGTERM); asked again, it is killed."""
        folder = self.path(job_id)
        marks = read_json_object(folder / PROCESS)
        is_asked = (folder / CANCELLED).exists()
        if self.state(job_id) == "running":
            write_whole(folder / CANCELLED, "")
            process = process_of(marks.get("child"))
            with suppress(psutil.Error):
                if process is not None:
                    process.kill() if is_asked else process.terminate()

    def _reap(self) -> None:
        """Take note of the ends of processes that this one started: until then they stay as zombies."""
        self._started = [process for process in self._started if process.poll() is None]


def new_id() -> str:
    """Of a job or an entry of the queue; later ones come behind earlier ones in the alphabet."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
