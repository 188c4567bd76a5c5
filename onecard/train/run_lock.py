"""One run per directory: a lock that dies with its process.

The lock is the operating system's (through filelock), so a killed run leaves nothing to clean up; the process id in
the file beside it is only there to be told to a person. Knows nothing of checkpoints. In a run of several processes
only the first takes the lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from onecard.errors import CheckpointError

LOCK = ".run.lock"
OWNER = ".run.pid"  # a file of its own: on Windows nobody else can read a locked one


class RunLock:
    """Context manager that holds `run_dir` for this process. Where nothing was written meanwhile, nothing is left.

    Raises: CheckpointError when another run holds it (its process id is named), or the directory cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self._lock = FileLock(str(self.run_dir / LOCK))
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        self._made = [path for path in (self.run_dir, *self.run_dir.parents) if not path.exists()]
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            (self.run_dir / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except Timeout:
            raise CheckpointError(
                f"{self.run_dir} is in use by another run ({self._owner()}). Wait until that one ends, "
                "stop it, or give another --output_path."
            ) from None
        except OSError as reason:
            self._lock.release()
            raise CheckpointError(
                f"{self.run_dir} cannot be written ({reason.strerror or reason}). Give another --output_path, "
                "or make room or get the right to write there.",
                disk_full=True,
            ) from reason
        return self

    def __exit__(self, *_: object) -> None:
        # Remove the name first: once the lock is open another run may have written its own.
        with contextlib.suppress(OSError):
            (self.run_dir / OWNER).unlink()
        is_empty = self.run_dir.is_dir() and [path.name for path in self.run_dir.iterdir()] == [LOCK]
        if is_empty:
            # While it is held: a process that has it open already finds it gone, and makes another one.
            self._remove_lock()
        self._lock.release()
        if is_empty:
            if os.name == "nt":  # which removes no file that is open, here or in another process
                self._remove_lock()
            with contextlib.suppress(OSError):
                for path in self._made:
                    path.rmdir()

    def _remove_lock(self) -> None:
        with contextlib.suppress(OSError):
            (self.run_dir / LOCK).unlink()

    def _owner(self) -> str:
        try:
            return (self.run_dir / OWNER).read_text(encoding="utf-8").strip() or "process unknown"
        except (OSError, ValueError):
            return "process unknown"
