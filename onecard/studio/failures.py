"""Why a job failed, in a person's words with the next step: its last error line, or what its exit code says."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from onecard.console import UNSAFE

ERROR = re.compile(r"(?:error|错误)[:：] ?(.*)")
KILLED = (-9, 137)  # SIGKILL, of POSIX and as shells and Docker tell it
MOST_TEXT = 2000  # characters


class Failure(NamedTuple):
    """What went wrong, and what to do: `next` is a key of the page's words (words/train.yaml, next_KEY)."""

    text: str
    next: str


def failure_of(job: dict[str, Any], log: str, *, has_checkpoint: bool = False) -> Failure | None:
    """Why this job failed or was lost; None where it did neither. log: the end of its output."""
    if job["state"] not in ("failed", "lost"):
        return None
    said = last_error(log)
    if job["state"] == "lost" or (job["exit_code"] in KILLED and not said):
        return Failure(said, "resume_killed" if has_checkpoint else "killed")
    if job["exit_code"] == 2:
        return Failure(said, "settings")
    if re.search(r"out of memory|memory ran out|does not fit|显存|内存不足", said, re.IGNORECASE):
        return Failure(said, "memory")
    return Failure(said or last_line(log), "resume" if has_checkpoint else "log")


def reason_in(log: str) -> str:
    """What a program that failed said last: its error, else its last line."""
    return last_error(log) or last_line(log)


def last_error(log: str) -> str:
    """The last message that began with `error:`, with the lines that belong to it."""
    lines = plain_lines(log)
    starts = [at for at, line in enumerate(lines) if ERROR.match(line)]
    if not starts:
        return ""
    first = starts[-1]
    # `run again with --debug` follows an error that was not foreseen, which is the one that matters.
    if len(starts) > 1 and re.search(r"--debug", lines[first]):
        first = starts[-2]
    found = [ERROR.match(lines[first])[1]]  # type: ignore[index]
    for line in lines[first + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line)
    return "\n".join(found)[:MOST_TEXT]


def last_line(log: str) -> str:
    """The last line with something on it."""
    return next((line for line in reversed(plain_lines(log)) if line.strip()), "")[:MOST_TEXT]


def plain_lines(log: str) -> list[str]:
    """The lines as a terminal would leave them: without colours, and of a line that was redrawn the last state."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log)
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [UNSAFE.sub("", line) for line in lines]
