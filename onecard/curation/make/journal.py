"""What has been made so far, in a file that only grows: a start that was killed anywhere goes on behind its last line.

The first line holds what the rows depend on; a start with other settings is refused once a task is done. Every further
line is one task that is done: its key, its rows, what it cost, or why it was given up. A line cut by a kill is taken
away and its task is done again, so nothing is there twice and nothing is lost.

Knows files. Does not know tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from onecard.errors import ConfigError, ModelError
from onecard.storage import is_disk_full, write_whole

JOURNAL_FILE = "journal.jsonl"


@dataclass
class JournalEntry:
    """A task that is done. `problem` is why it gave no row; the tokens are of all its requests."""

    key: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    n_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """The journal in a folder, held by one process; a context manager.

    Raises ConfigError: other settings than those it began with, another process, a file that is no journal;
    ModelError: no room or no right to write.
    """

    def __init__(self, folder: Path, depends_on: dict[str, Any]) -> None:
        from filelock import FileLock

        self._path = folder / JOURNAL_FILE
        self._lock = FileLock(folder / f".{JOURNAL_FILE}.lock")
        self._depends_on = depends_on
        self._stream: BinaryIO | None = None
        self.entries: list[JournalEntry] = []
        self.done: set[str] = set()

    def __enter__(self) -> Journal:
        from filelock import Timeout

        try:
            check_folder(self._path.parent)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if not self._path.exists():
                write_whole(self._path, _line(self._depends_on))
            self._read()
            self._stream = self._path.open("ab")
        except Timeout as reason:
            raise ConfigError("--output_path", f"{self._path.parent} is being written by another process") from reason
        except OSError as reason:
            self._lock.release()
            raise _unwritable(self._path, reason) from reason
        except ConfigError:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        self._lock.release()

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._path.open("r+b") as stream:
                stream.truncate(len(whole))
        lines = whole.splitlines()
        try:
            began_with = json.loads(lines[0])
            entries = [JournalEntry(**json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError, IndexError) as reason:
            raise ConfigError("--output_path", f"{self._path} is no journal of this program: {reason}") from reason
        plain = json.loads(_line(self._depends_on))
        if began_with != plain and not entries:  # such as a start whose options the model then refused
            write_whole(self._path, _line(self._depends_on))
        elif began_with != plain:
            changed = sorted(key for key in {*began_with, *plain} if began_with.get(key) != plain.get(key))
            raise ConfigError(
                "--output_path",
                f"{self._path.parent} was begun with other settings ({', '.join(changed)}); "
                "give those again to go on, or another place",
            )
        for entry in entries:
            self._take(entry)

    def _take(self, entry: JournalEntry) -> None:
        if entry.key not in self.done:
            self.done.add(entry.key)
            self.entries.append(entry)

    def add(self, entry: JournalEntry) -> None:
        """Write a finished task durably. Raises ModelError where there is no room."""
        assert self._stream is not None, "the journal is not open"
        try:
            self._stream.write(_line(asdict(entry)))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as reason:
            raise _unwritable(self._path, reason) from reason
        self._take(entry)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row that was made, in the order of the tasks."""
        for entry in self.entries:
            yield from entry.rows


def check_folder(folder: Path) -> None:
    """Raises ConfigError where no journal can be begun or gone on with, as far as that is seen without holding it."""
    if folder.is_file():
        raise ConfigError("--output_path", f"{folder} is a file; give a folder")
    if (folder / JOURNAL_FILE).exists() or not folder.is_dir():
        return
    if any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ConfigError("--output_path", f"{folder} holds other files; give a folder of its own")


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


def _unwritable(path: Path, reason: OSError) -> ModelError:
    what = "no room for" if is_disk_full(reason) else "cannot write"
    return ModelError(f"{what} {path}: {reason.strerror or reason}; what was made before is kept, start again to go on")
