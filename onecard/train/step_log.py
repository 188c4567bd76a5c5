"""What a run writes down by step in its directory, a row of JSON on each line: its losses (log.jsonl), the answers that
were sampled to learn from (rollouts.jsonl), and those to questions of a person (questions.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.storage import write_whole

LOG_NAME, ROLLOUTS_NAME, QUESTIONS_NAME = "log.jsonl", "rollouts.jsonl", "questions.jsonl"


class StepLog:
    """Grows by the rows of each step."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path, self._warned = run_dir / name, False

    def keep_up_to(self, step: int) -> None:
        """Drop the rows after this step: they belong to work that was lost."""
        if self._path.is_file():
            write_whole(self._path, "".join(_line(row) for row in read_rows(self._path) if row.get("step", 0) <= step))

    def write(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """A full disk is told once and ends no run: the log can be redrawn, the night cannot."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line({"step": step, **row}) for row in rows)
        except OSError as reason:
            if not self._warned:
                warn(f"{self._path.name} cannot be written ({reason}); training goes on")
            self._warned = True


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, none where there is none; a last line that a kill left half-written is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl."""
    return read_rows(run_dir / LOG_NAME)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
