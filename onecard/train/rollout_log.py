"""The answers that were sampled while training, with their rewards: rollouts.jsonl in the directory of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.storage import write_whole

LOG_NAME = "rollouts.jsonl"


class RolloutLog:
    """Grows by the answers of each step."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._warned = run_dir / LOG_NAME, False

    def keep_up_to(self, step: int) -> None:
        """Drop what was sampled after this step: it belongs to work that was lost."""
        if self._path.is_file():
            kept = [row for row in read_rollouts(self._path.parent) if row["step"] <= step]
            write_whole(self._path, "".join(map(_line, kept)))

    def write(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """A full disk is told once and ends no run."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line({"step": step, **row}) for row in rows)
        except OSError as reason:
            if not self._warned:
                warn(f"{LOG_NAME} cannot be written ({reason}); training goes on")
            self._warned = True


def read_rollouts(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows of rollouts.jsonl; a last line that a kill left half-written is passed over."""
    with (run_dir / LOG_NAME).open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
