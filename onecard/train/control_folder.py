"""The run's side of RUN/control: its status, the requests that came, and the replies to them. Knows files, no model.

Nothing that lies there ends a run: what cannot be read is refused, and a disk that is full is told once.
"""

from __future__ import annotations

import json
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onecard.console import first_line, warn
from onecard.errors import Stopped
from onecard.storage import write_whole
from onecard.train.control import (
    FOLDER,
    ID,
    KINDS,
    MOST_BYTES,
    REPLY,
    REQUEST,
    STATUS_NAME,
    Reply,
    RunStatus,
    State,
    this_process,
)
from onecard.train.run_lock import LOCK, OWNER

MOST_WAITING = 64
SECONDS_PER_STEP = 1.0  # the step in the status is at most so old
STALE = "of an earlier start of this run, and is not carried out by this one; ask again"


@dataclass
class Request:
    """One request that is to be carried out; `given` are its fields."""

    id: str
    kind: str
    given: dict[str, Any]
    began_s: float = field(default_factory=time.monotonic)


class ControlFolder:
    """RUN/control while a run holds its directory; without a directory it does nothing and holds no requests.

    Where nothing else was written into the directory until `close`, nothing stays of it.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self._path = None if run_dir is None else run_dir / FOLDER
        self._status = RunStatus("starting", start=secrets.token_hex(8))
        self._written_s, self._warned = 0.0, False
        self._seen: set[str] = set()
        self.waiting: list[Request] = []

    @property
    def state(self) -> State:
        return self._status.state

    def open(self) -> None:
        """Say that the run begins; what earlier starts left is refused or removed."""
        if self._path is None:
            return
        with suppress(OSError):
            for pattern in (f"*{REPLY}", ".*.partial"):  # the second: of a request whose sender was killed
                for old in self._path.glob(pattern) if self._path.is_dir() else ():
                    old.unlink()
            self._path.mkdir(exist_ok=True)
        self._status = replace(self._status, **this_process())
        self.say("starting")
        self.poll()

    def close(self, reason: BaseException | None) -> None:
        """Say how the run ended, and that what still waits will not be carried out."""
        if self._path is None:
            return
        self.refuse_all()
        if reason is not None and self.run_dir is not None:
            others = {path.name for path in self.run_dir.iterdir()} - {LOCK, OWNER, FOLDER}
            if not others:
                shutil.rmtree(self._path, ignore_errors=True)
                return
        state: State = "ended" if reason is None else "stopped" if isinstance(reason, Stopped) else "failed"
        self.say(state, message="" if reason is None else first_line(reason))

    def say(self, state: State, step: int | None = None, total_steps: int | None = None, message: str = "") -> None:
        """Let the status be this; a step is kept where none is given."""
        changed = replace(self._status, state=state, message=message)
        changed = changed if step is None else replace(changed, step=step)
        changed = changed if total_steps is None else replace(changed, total_steps=total_steps)
        is_new = state != self._status.state or message != self._status.message
        self._status = replace(changed, since=time.time()) if is_new or not changed.since else changed
        self._tell()

    def at_step(self, step: int, total_steps: int) -> None:
        """Keep the step in the status, which is written now and then."""
        self._status = replace(self._status, step=step, total_steps=total_steps)
        if time.monotonic() - self._written_s >= SECONDS_PER_STEP:
            self._tell()

    @contextmanager
    def meanwhile(self, state: State) -> Iterator[None]:
        """Inside, the status is this; behind it, what it was before."""
        before = self._status.state
        self.say(state)
        try:
            yield
        finally:
            self.say(before)

    def poll(self) -> None:
        """Take up what was requested since the last time, oldest first."""
        if self._path is None or not self._status.takes_requests:
            return
        try:
            names = sorted(path.name for path in self._path.glob(f"*{REQUEST}"))
        except OSError:
            return
        for name in names:
            request_id = name.removesuffix(REQUEST)
            if ID.fullmatch(request_id) and request_id not in self._seen:
                self._seen.add(request_id)
                self._take_up(request_id)

    @property
    def must_stop(self) -> bool:
        """Whether a request to stop waits."""
        return any(request.kind == "stop" for request in self.waiting)

    def answer(self, request: Request, reply: Reply) -> None:
        """Write the reply, with the step and the time taken so far."""
        took = round(time.monotonic() - request.began_s, 3)
        name = f"{request.id}{REPLY}"
        is_written = self._write(name, asdict(replace(reply, step=self._status.step, seconds=took)))
        if reply.is_final and not is_written and self._path is not None:
            with suppress(OSError):  # an earlier one would let who asked wait until the run ends
                (self._path / name).unlink()

    def refuse_all(self) -> None:
        """From now on nothing is carried out any more: the last step is done, or the run ends."""
        self.poll()
        for request in self.waiting:
            self.answer(request, Reply("failed", error="the run has ended before this was carried out"))
        self.waiting = []
        self._status = replace(self._status, takes_requests=False)
        self._tell()

    def _take_up(self, request_id: str) -> None:
        """Read one request and remove its file; what is wrong with it is its reply."""
        assert self._path is not None
        path = self._path / f"{request_id}{REQUEST}"
        request = Request(request_id, "", {})
        try:
            kind, given = _read_request(path, self._status.start)
            if len(self.waiting) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} requests wait already; ask again later")
            request = replace(request, kind=kind, given=given)
            self.waiting.append(request)
        except (OSError, ValueError, RecursionError) as reason:
            self.answer(request, Reply("failed", error=f"the request is {first_line(reason)}"))
        else:
            self.answer(request, Reply("waiting"))
        with suppress(OSError):
            path.unlink()

    def _tell(self) -> None:
        self._written_s = time.monotonic()
        self._write(STATUS_NAME, asdict(self._status))

    def _write(self, name: str, content: dict[str, Any]) -> bool:
        """Whether it could be written."""
        if self._path is None:
            return False
        try:
            write_whole(self._path / name, json.dumps(content, ensure_ascii=False), durable=False)
        except OSError as reason:
            if not self._warned:
                warn(f"{self._path / name} cannot be written ({reason}); training goes on, and cannot be asked")
            self._warned = True
            return False
        return True


@contextmanager
def open_control(run_dir: Path | None) -> Iterator[ControlFolder]:
    """The control folder of a run from its start to its end; None: one that does nothing."""
    folder = ControlFolder(run_dir)
    folder.open()
    try:
        yield folder
    except BaseException as reason:
        folder.close(reason)
        raise
    folder.close(None)


def _read_request(path: Path, start: str) -> tuple[str, dict[str, Any]]:
    """The kind and the fields of a request for this start. Raises ValueError with what it is instead, and OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("no ordinary file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as reason:
        raise ValueError(f"no JSON in UTF-8 ({reason})") from reason
    if not isinstance(found, dict) or not isinstance(found.get("given", {}), dict):
        raise ValueError("no JSON object with the fields kind, start and given")
    if found.get("kind") not in KINDS:
        raise ValueError(f"of the kind {found.get('kind')!r}, which is none of {', '.join(KINDS)}")
    if found.get("start") != start:
        raise ValueError(STALE)
    return found["kind"], found.get("given", {})
