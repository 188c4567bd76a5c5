"""The control channel of a run: what is asked of it, and what it says of itself, as files in RUN/control.

For programs and pages on the same machine; `control_folder.py` is the run's own side. Imports no torch. A request says
which start of the run it is for, so none is ever carried out by a later one; it names no file.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import psutil

from onecard.console import nearest
from onecard.errors import ConfigError, OneCardError
from onecard.storage import write_whole

FOLDER, STATUS_NAME = "control", "status.json"
REQUEST, REPLY = ".request.json", ".reply.json"
ID = re.compile(r"[0-9]{20}-[0-9a-f]{8}")  # the time in nanoseconds and a random number
MOST_BYTES = 1 << 20  # of a request
Kind = Literal["pause", "continue", "stop", "save", "ask", "give_back", "take_back"]
KINDS: tuple[str, ...] = get_args(Kind)
State = Literal[
    "starting", "training", "evaluating", "paused", "given_back", "ended", "stopped", "failed", "lost"
]  # fmt: skip
LIVE: tuple[State, ...] = ("starting", "training", "evaluating", "paused", "given_back")
Record = TypeVar("Record", "RunStatus", "Reply")
_SAME_START_S = 5.0  # by how much two readings of the start of one process may differ


class NotRunning(OneCardError):
    """A request to a run that cannot carry it out."""


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself. `step`: optimizer steps done. `since`: the state's beginning, in seconds since 1970.

    takes_requests: False behind the last step. start: names this start of the run. process_began: when the process
    `pid` on `host` began, in seconds since 1970. message: why the run ended, where there is something to say.
    """

    state: State
    step: int = 0
    total_steps: int = 0
    pid: int = 0
    since: float = 0.0
    takes_requests: bool = True
    start: str = ""
    process_began: float = 0.0
    host: str = ""
    message: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state in LIVE

    @property
    def sentence(self) -> str:
        """The state in words."""
        where = f"step {self.step:,} of {self.total_steps:,}" if self.total_steps else "before its first step"
        return f"{self.state.replace('_', ' ')}, {where}{f': {self.message}' if self.message else ''}"


@dataclass(frozen=True)
class Reply:
    """What came of a request. `text`: of an ask the answer so far. `step`: optimizer steps done when it was begun."""

    state: Literal["waiting", "running", "done", "failed"]
    text: str = ""
    error: str = ""
    step: int | None = None
    seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        return self.state in ("done", "failed")


def send(run: Path, kind: str, **given: Any) -> str:
    """Ask something of the run in this directory; returns the id of the request, for `reply`.

    given: of an ask its `question` or `messages`, `system`, and options of sampling by name, such as `max_new_tokens`.
    Raises NotRunning where no run would carry it out, ConfigError for an unknown kind or a request of over 1 MiB, and
    OneCardError where it cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError("", f"{kind!r} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    now = status(run)
    if not now.is_alive or not now.takes_requests:
        raise NotRunning(f"{run} takes no requests: {now.sentence if not now.is_alive else 'its last step is done'}")
    if now.host != socket.gethostname():
        raise NotRunning(f"{run} is trained on another machine, {now.host}; ask there")
    content = json.dumps({"kind": kind, "start": now.start, "given": given}, ensure_ascii=False)
    if len(content.encode("utf-8")) > MOST_BYTES:
        raise ConfigError("", f"a request of over {MOST_BYTES:,} bytes is not taken; ask something shorter")
    request_id = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    try:
        write_whole(Path(run) / FOLDER / f"{request_id}{REQUEST}", content, durable=False)
    except OSError as reason:
        why = reason.strerror or reason
        raise OneCardError(
            f"{run} cannot be asked: nothing can be written there ({why}); make room, and ask again"
        ) from reason
    return request_id


def reply(run: Path, request_id: str) -> Reply | None:
    """What has come of a request so far; None for one that is unknown. Where the run has ended, it has failed."""
    if not ID.fullmatch(request_id):
        return None
    folder = Path(run) / FOLDER
    is_waiting = (folder / f"{request_id}{REQUEST}").is_file()
    found = _read(folder / f"{request_id}{REPLY}", Reply)
    if found is None:
        found = Reply("waiting") if is_waiting else None
    if found is None or found.is_final:
        return found
    now = status(run)
    return found if now.is_alive else replace(found, state="failed", error=f"the run has ended: {now.sentence}")


def status(run: Path) -> RunStatus:
    """What the run in this directory does. Raises NotRunning where none was ever started, or that cannot be read."""
    found = _read(Path(run) / FOLDER / STATUS_NAME, RunStatus)
    if found is None:
        raise NotRunning(f"{run} has no control/status.json, which each run writes while it goes on; give the "
                         "directory of a run")  # fmt: skip
    is_lost = found.is_alive and found.host == socket.gethostname() and not _is_there(found)
    return replace(found, state="lost", message=f"process {found.pid} is gone") if is_lost else found


def this_process() -> dict[str, Any]:
    """The parts of a status that say which process the run is."""
    own = psutil.Process()
    return {"pid": own.pid, "process_began": own.create_time(), "host": socket.gethostname()}


def from_fields(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A record of the fields that are known here. Raises TypeError where one without a default is missing."""
    known = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def _is_there(found: RunStatus) -> bool:
    """Whether the process lives, and is no later one with the same number."""
    try:
        return abs(psutil.Process(found.pid).create_time() - found.process_began) < _SAME_START_S
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        return from_fields(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
