"""Runs one job to its end: `python -m onecard.studio.supervisor JOB_FOLDER`, started apart from the studio.

A job is started once: whoever makes its process.json runs it, all others leave. What it ended with is written by this
process, so that it is known whether or not there was a studio at that time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from onecard.storage import write_whole
from onecard.studio.processes import mark_of

SPEC, PROCESS, EXIT, LOG = "job.json", "process.json", "exit.json", "log.txt"
CANNOT_START = 127  # as shells have it


def supervise(folder: Path) -> int | None:
    """Run the job of this folder; its exit code, or None where another process has it."""
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    try:
        with (folder / PROCESS).open("x", encoding="utf-8") as claim:
            json.dump({"supervisor": mark_of(os.getpid())}, claim)
    except FileExistsError:
        return None
    log = Path(spec["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(spec["command"], cwd=spec["cwd"], stdin=subprocess.DEVNULL, stdout=output,
                                     stderr=subprocess.STDOUT)  # fmt: skip
        except OSError as reason:
            output.write(f"error: {spec['command'][0]} cannot be started: {reason}\n".encode())
            return _ended(folder, CANNOT_START)
        marks = {"supervisor": mark_of(os.getpid()), "child": mark_of(child.pid)}
        write_whole(folder / PROCESS, json.dumps(marks))
        return _ended(folder, child.wait())


def _ended(folder: Path, code: int) -> int:
    write_whole(folder / EXIT, json.dumps({"code": code, "ended": time.time()}))
    return code


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
