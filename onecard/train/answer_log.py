"""The answers of the model that is being trained, by step, in the directory of a run: those that were sampled to learn
from, with their rewards (rollouts.jsonl), and those to questions of a person (questions.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.storage import write_whole

ROLLOUTS_NAME, QUESTIONS_NAME = "rollouts.jsonl", "questions.jsonl"


class AnswerLog:
    """Grows by the answers of each step."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path, self._warned = run_dir / name, False

    def keep_up_to(self, step: int) -> None:
        """Drop what was answered after this step: it belongs to work that was lost."""
        if self._path.is_file():
            kept = [row for row in read_answers(self._path) if row["step"] <= step]
            write_whole(self._path, "".join(map(_line, kept)))

    def write(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """A full disk is told once and ends no run."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line({"step": step, **row}) for row in rows)
        except OSError as reason:
            if not self._warned:
                warn(f"{self._path.name} cannot be written ({reason}); training goes on")
            self._warned = True


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of such a file; a last line that a kill left half-written is passed over."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
