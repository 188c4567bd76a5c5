"""The queue: runs one after another, in a file that is written whole before and after each change.

A run is first marked as started and then started; a studio that is killed in between starts the same job again, which
its claim keeps from running twice (supervisor.py). What became of a run is asked of its job, not stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onecard.errors import CheckpointError
from onecard.serve.http_error import ApiError
from onecard.storage import write_whole
from onecard.studio.jobs import ALIVE, new_id
from onecard.studio.runs import STUDIO_LOG, Runs

QUEUE_FILE, QUEUE_LOCK, RUNNER_LOCK = "queue.json", "queue.lock", "runner.lock"
WAITING, STARTED = "waiting", "started"
MOST_ENDED = 50  # entries that are over and still listed
LOCK_S = 20.0
AGAIN_S = 60.0  # after which a job that nobody has claimed is started again


@dataclass
class RunQueue:
    """The queue of a studio's folder; may be asked by several processes, and run by one of them."""

    folder: Path
    runs: Runs
    verb: str = "finetune"
    clock: Callable[[], float] = time.monotonic
    _runner: FileLock | None = None
    _spawned: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = FileLock(str(self.folder / QUEUE_LOCK), timeout=LOCK_S, thread_local=False)

    def listed(self) -> dict[str, Any]:
        """{entries, is_held}: each entry with the `state` of its job, and what it was asked for."""
        content = self._read()
        return {"entries": [self._view(entry) for entry in content["entries"]], "is_held": content["is_held"]}

    def add(self, name: str, words: Sequence[str], options: Mapping[str, Any], output: Path) -> str:
        """Put a run at the end; its number. Raises ApiError (409) where a run of the queue has the folder."""
        entry_id = new_id()
        entry = {"id": entry_id, "name": name, "words": list(words), "options": dict(options),
                 "output": str(output), "phase": WAITING, "added": time.time()}  # fmt: skip
        with self._changing() as content:
            if any(self._keeps_out(other, output) for other in content["entries"]):
                raise ApiError(409, f"a run called {name} waits or goes on; choose another name", param="--name")
            content["entries"].append(entry)
        return entry_id

    def remove(self, entry_id: str) -> None:
        """Take an entry out; what it has started goes on only if it is stopped itself. Raises ApiError."""
        with self._changing() as content:
            entry = _find(content, entry_id)
            if entry["phase"] == STARTED and self._job_state(entry) in ALIVE:
                raise ApiError(409, f"{entry['name']} goes on; stop it first", code="running")
            content["entries"].remove(entry)

    def move(self, entry_id: str, by: int) -> None:
        """Let an entry that waits change places with the one before (-1) or behind it (1). Raises ApiError."""
        with self._changing() as content:
            entries = content["entries"]
            entry = _find(content, entry_id)
            waiting = [one for one in entries if one["phase"] == WAITING]
            if entry not in waiting:
                raise ApiError(409, f"{entry['name']} has been started", code="started")
            at = waiting.index(entry) + (1 if by > 0 else -1)
            if 0 <= at < len(waiting):
                i, j = entries.index(entry), entries.index(waiting[at])
                entries[i], entries[j] = entries[j], entries[i]

    def hold(self, is_held: bool) -> None:
        """Start no further run, or go on with it."""
        with self._changing() as content:
            content["is_held"] = bool(is_held)

    def waits_for(self, output: Path) -> bool:
        """Whether an entry that is not over has this folder."""
        return any(self._is_open(entry) and entry["output"] == str(output) for entry in self._read()["entries"])

    def tick(self) -> str | None:
        """Start what is to be started; the number of the entry, if any. For one thread, about once a second."""
        if not self._is_runner():
            return None
        content = self._read()
        open_entries = [entry for entry in content["entries"] if self._is_open(entry)]
        begun = [entry for entry in open_entries if entry["phase"] == STARTED]
        for entry in begun:
            if self._job_state(entry) in ("starting", "none"):  # marked, and perhaps never started
                self._start(entry)
        if begun or content["is_held"] or not open_entries or self.runs.running():
            return None
        with self._changing() as content:
            entry = next((one for one in content["entries"] if one["phase"] == WAITING), None)
            if entry is None or content["is_held"]:
                return None
            entry["phase"] = STARTED
        self._start(entry)
        return str(entry["id"])

    def close(self) -> None:
        """Let another studio run the queue."""
        if self._runner is not None:
            self._runner.release()
            self._runner = None

    def _is_runner(self) -> bool:
        if self._runner is None:
            lock = FileLock(str(self.folder / RUNNER_LOCK), thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            self._runner = lock
        return True

    def _start(self, entry: Mapping[str, Any]) -> None:
        now = self.clock()
        if now - self._spawned.get(entry["id"], -AGAIN_S) < AGAIN_S:
            return
        self._spawned[entry["id"]] = now
        output = Path(entry["output"])
        output.mkdir(parents=True, exist_ok=True)
        self.runs.note(output, job=entry["id"], words=entry["words"])
        self.runs.jobs.start(self.verb, [self.verb, *entry["words"]], title=entry["name"], job_id=entry["id"],
                             log=output / STUDIO_LOG, about={"output": str(output)})  # fmt: skip

    def _is_open(self, entry: Mapping[str, Any]) -> bool:
        return entry["phase"] == WAITING or self._job_state(entry) in (*ALIVE, "none")

    def _keeps_out(self, entry: Mapping[str, Any], output: Path) -> bool:
        """Whether no other entry may have this folder, since this one waits or goes on in it.

        A run that says it has stopped needs seconds until its process is gone; who resumes it then waits for that.
        """
        is_of_it = entry["output"] == str(output) and self._is_open(entry)
        return is_of_it and (entry["phase"] == WAITING or self.runs.is_running(output))

    def _job_state(self, entry: Mapping[str, Any]) -> str:
        """That of the job; none where it was not even written down."""
        try:
            return str(self.runs.jobs.get(entry["id"])["state"])
        except ApiError:
            return "none"

    def _view(self, entry: dict[str, Any]) -> dict[str, Any]:
        state = WAITING
        if entry["phase"] == STARTED:
            state = self._job_state(entry)
            state = "starting" if state == "none" else state
        output = Path(entry["output"])
        run = self.runs.id_of(output) if output.is_relative_to(self.runs.root) else None
        return {**entry, "state": state, "run": run}

    def _read(self) -> dict[str, Any]:
        """The file's content. Raises CheckpointError where it is broken, which writing it whole prevents."""
        path = self.folder / QUEUE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {"entries": list(content["entries"]), "is_held": bool(content["is_held"])}
        except FileNotFoundError:
            return {"entries": [], "is_held": False}
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise CheckpointError(f"{path} cannot be read ({reason}); move it away to begin an empty queue") from None

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The content, written back at the end; nobody else changes it meanwhile. Raises CheckpointError."""
        try:
            with self._lock:
                content = self._read()
                yield content
                over = [entry for entry in content["entries"] if not self._is_open(entry)]
                for entry in over[: max(0, len(over) - MOST_ENDED)]:
                    content["entries"].remove(entry)
                write_whole(self.folder / QUEUE_FILE, json.dumps(content, ensure_ascii=False, indent=1))
        except Timeout:
            raise CheckpointError(f"{self.folder / QUEUE_FILE} is held by another studio; close that one") from None
        except OSError as reason:
            raise CheckpointError(
                f"{self.folder / QUEUE_FILE} cannot be written: {reason.strerror or reason}; make room there"
            ) from None


def _find(content: Mapping[str, Any], entry_id: str) -> dict[str, Any]:
    for entry in content["entries"]:
        if entry["id"] == entry_id:
            found: dict[str, Any] = entry
            return found
    raise ApiError(404, "there is no such entry in the queue", code="no_such_entry")
