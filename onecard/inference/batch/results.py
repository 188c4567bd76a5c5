"""The jsonl file that answers go into: whole lines only, in order, and never of two different commands.

    answers.jsonl                  one line per question: the record's own fields, then `output` and `finish_reason`
    answers.jsonl.settings.json    what the answers depend on, so that a second start is the same job

A killed process leaves at most one unfinished last line, which the next start drops. Knows bytes and JSON. It does not
know models or how an answer is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onecard.data.json_records import plain_value
from onecard.errors import CheckpointError, ConfigError
from onecard.storage import write_whole

FLAG = "--output_path"
OWN_FIELDS = ("output", "finish_reason", "error")
BEST_OF_FIELDS = ("reward", "rewards")
_BLOCK_BYTES = 2**20


class AnswerFile:
    """Context manager around the file; `n_done` is the number of answers that stand in it.

    Raises ConfigError for a file that belongs to other questions or settings or that another process is writing,
    CheckpointError when it cannot be written; the whole lines in it stay as they are.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings_path = path.with_name(path.name + ".settings.json")
        self.n_done = 0
        self._settings = json.loads(json.dumps(settings))  # as it will be read back
        self._lock = FileLock(str(path.with_name(f".{path.name}.lock")))

    def __enter__(self) -> AnswerFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(FLAG, f"another process is writing {self.path}; wait for it, or stop it") from None
        except OSError as reason:
            raise self._unwritable(reason) from reason
        try:
            self._open()
        except OSError as reason:
            self._lock.release()
            raise self._unwritable(reason) from reason
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows after the last one; they are on the disk when this returns. Raises CheckpointError."""
        if not rows:
            return
        try:
            with self.path.open("ab") as stream:
                stream.write(b"".join(as_line(row) for row in rows))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as reason:
            raise self._unwritable(reason) from reason
        self.n_done += len(rows)

    def _open(self) -> None:
        self.n_done, n_whole_bytes = whole_lines(self.path)
        # Ours has its settings before the first byte; what has none, and no end of a line, is another program's.
        is_foreign = not self.settings_path.exists() and self.path.exists() and self.path.stat().st_size > 0
        if self.n_done or is_foreign:
            self._check_same_job()
            with self.path.open("r+b") as stream:
                stream.truncate(n_whole_bytes)
            return
        # Settings first: answers without them could not be gone on with.
        write_whole(self.settings_path, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")
        self.path.write_bytes(b"")

    def _check_same_job(self) -> None:
        advice = "give another --output_path, or delete it to begin anew"
        try:
            stored = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                FLAG, f"{self.path} exists, and {self.settings_path.name} does not say what was asked; {advice}"
            ) from None
        except ValueError as reason:
            raise ConfigError(FLAG, f"{self.settings_path} is damaged ({reason}); {advice}") from reason
        if stored == self._settings:
            return
        names = [*self._settings, *(name for name in stored if name not in self._settings)]
        differing = [name for name in names if stored.get(name) != self._settings.get(name)]
        listed = "\n".join(f"  {name}: then {stored.get(name)}, now {self._settings.get(name)}" for name in differing)
        raise ConfigError(FLAG, f"{self.path} holds {self.n_done} answers of another job:\n{listed}\n{advice}")

    def _unwritable(self, reason: OSError) -> CheckpointError:
        return CheckpointError(
            f"{FLAG}: {self.path} cannot be written ({reason.strerror or reason}); the {self.n_done} answers in it "
            "are safe. Make room or get the right to write there, then run the same command again.",
            disk_full=True,
        )


def answer_row(
    fields: Mapping[str, Any], output: str | None, finish_reason: str, error: str = "", own: Sequence[str] = OWN_FIELDS
) -> dict[str, Any]:
    """The record's fields and ours. A field of a name that is ours moves: `output` becomes `reference_output`."""
    row: dict[str, Any] = {}
    for name, value in fields.items():
        while name in row or name in own:
            name = f"reference_{name}"
        row[name] = value
    row |= {"output": output, "finish_reason": finish_reason}
    return row | {"error": error} if error else row


def as_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8; characters as they are, numbers as numbers."""
    plain = plain_value(row)
    try:
        return (json.dumps(plain, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a character in a field that nobody asked about
        return (json.dumps(plain) + "\n").encode("ascii")


def whole_lines(path: Path) -> tuple[int, int]:
    """How many lines of the file are finished, and how many bytes these take; (0, 0) for a missing file."""
    n_lines = n_bytes = position = 0
    if not path.exists():
        return 0, 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            n_lines += block.count(b"\n")
            last = block.rfind(b"\n")
            n_bytes = position + last + 1 if last >= 0 else n_bytes
            position += len(block)
    return n_lines, n_bytes
