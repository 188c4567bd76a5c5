"""The function of --reward_file, asked in a process of its own and given a time limit. See reward_worker.py."""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from onecard.config.rollouts import reward_file_parts
from onecard.errors import OneCardError

WORKER = Path(__file__).with_name("reward_worker.py")
LOADING_S = 120.0  # for the file's imports, which may be heavy


class RewardError(OneCardError):
    """A reward that could not be had: what was asked, of which file, what came of it, and what to do."""


class RewardFile:
    """A function in a file of the user's. Its process starts with the first call and ends with this one."""

    def __init__(self, text: str, seconds: float, title: str = "") -> None:
        """title: what it is called in errors; else the function and its file."""
        file, self._function = reward_file_parts(text)
        self._file, self._seconds = Path(file).expanduser().resolve(), seconds
        self._title = title or f"{self._function} of {self._file.name}"
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __call__(self, prompt: str, answer: str, reference: str | None, row: Any, record: str) -> float:
        """The reward of an answer to the prompt of a record. Raises RewardError."""
        where = f"{record}: {self._title}"
        if self._process is None:
            self._start()
        given = {"prompt": prompt, "answer": answer, "reference": reference, "row": row}
        found = self._ask(given, f"{where}, asked about the answer {answer!r:.300}", self._seconds)
        return float(found["reward"])

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
            atexit.unregister(self.close)

    def _start(self) -> None:
        """Raises RewardError where the file cannot be loaded."""
        # The same sets in the same order in each start of a run.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
        words = [sys.executable, str(WORKER), str(self._file), self._function]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                                   env=environment)  # fmt: skip
        self._process, self._answers = process, queue.Queue()
        atexit.register(self.close)
        threading.Thread(target=_pass_on, args=(process.stdout, self._answers), daemon=True).start()
        self._ask(None, f"--reward_file {self._file}", LOADING_S)

    def _ask(self, given: dict[str, Any] | None, what: str, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        try:
            if given is not None:
                self._process.stdin.write(json.dumps(given) + "\n")
                self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise RewardError(f"{what}: no reward within {seconds:g} s. Mend it, or give it longer with "
                              " --reward_seconds; the same command goes on from the last checkpoint"
                              ) from None  # fmt: skip
        except OSError:
            line = ""
        found = json.loads(line) if line else {"error": f"its process ended ({self._process.wait()})"}
        if "error" in found:
            self.close()
            raise RewardError(f"{what}: {found['error']}. Mend the file; the same command goes on from the last "
                              "checkpoint")  # fmt: skip
        return dict(found)


def _pass_on(lines: Any, answers: queue.Queue[str]) -> None:
    """Lines as they come, and an empty one at the end."""
    for line in lines:
        answers.put(line)
    answers.put("")
