"""Processes that outlive the studio: started apart from it, and known again by number and time of start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from onecard.config.inference import API_KEY_VARIABLE
from onecard.installation import IS_CLONE, SHIPPED

SAME_START_S = 10.0  # psutil derives the time from that of the boot, which moves a little when the clock is set


def start_apart(
    command: Sequence[str], cwd: Path | None = None, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that neither Ctrl-C nor the end of the studio reaches it.

    more: of the environment, such as a key, which `ps` would show among the words.
    """
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return subprocess.Popen(command, cwd=cwd, env={**environment(), **(more or {})}, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **apart)  # fmt: skip


def environment() -> dict[str, str]:
    """That of the studio without its key, with UTF-8, and with a way to find this package in a clone."""
    found = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    found.pop(API_KEY_VARIABLE, None)
    if IS_CLONE:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SHIPPED), found.get("PYTHONPATH", ""))))
    return found


def mark_of(pid: int) -> dict[str, Any]:
    """What tells this process from a later one of the same number; its start is None where it has ended."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.Error:
        return {"pid": pid, "started": None}


def process_of(mark: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process with this mark, if it still runs."""
    if not mark or not isinstance(mark.get("pid"), int) or not isinstance(mark.get("started"), (int, float)):
        return None
    try:
        process = psutil.Process(mark["pid"])
        is_same = abs(process.create_time() - mark["started"]) < SAME_START_S
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, ValueError, OverflowError):
        return None
