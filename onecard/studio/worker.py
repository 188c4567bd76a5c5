"""A process of the studio for what needs torch or transformers, so that the page opens at once and stays quick.

A question is a line of JSON on its input, the answer one on its output (`worker_process.py`). It begins with the first
question, ends by itself after a while without one, and with the studio, whose end closes its input. Knows questions by
name only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import count
from typing import Any

from onecard.errors import ConfigError, DataError, ModelError, OneCardError
from onecard.serve.http_error import ApiError

KINDS = {kind.__name__: kind for kind in (OneCardError, DataError, ModelError)}
GONE = 503
MOST_ASKERS = 1000  # pages that are remembered


class Worker:
    """One such process, asked by any number of threads, one after the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._numbers = count()
        self._newest: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False

    def ask(self, question: str, arguments: dict[str, Any], *, replaces: str = "") -> Any:
        """The answer. Blocks; what waits with the same `replaces` gives way to what is asked later.

        Raises the OneCardError of the answer, and ApiError: 409 for what gave way, 503 where the process is gone.
        """
        if len(self._newest) > MOST_ASKERS:
            self._newest.clear()
        number = self._newest[replaces] = next(self._numbers)
        with self._turn:
            if replaces and number != self._newest.get(replaces):
                raise ApiError(409, "a newer question has taken the place of this one", code="superseded")
            return self._ask({"question": question, "arguments": arguments})

    def stop(self) -> None:
        """End the process, whatever it does; the next question begins another one."""
        process = self._process
        if process is not None:
            self._is_stopped = True
            with suppress(OSError):
                process.kill()
            process.wait()

    def _ask(self, message: dict[str, Any]) -> Any:
        process, self._is_stopped = self._running(), False
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            process.kill()
            code = process.wait()
            self._process = None
            if self._is_stopped:
                raise ApiError(409, "it was stopped", code="stopped")
            text = f"the process that reads models and data ended (code {code}); ask again"
            raise ApiError(GONE, text, code="worker_gone")
        answer = json.loads(line)
        if "error" in answer:
            raise error_of(answer["error"])
        return answer["result"]

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "onecard.studio.worker_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
            )  # fmt: skip
        return self._process


def error_of(told: dict[str, Any]) -> OneCardError:
    """The error that was raised there."""
    if told["kind"] != "ConfigError":
        return KINDS.get(told["kind"], OneCardError)(told["message"])
    problems = [(flag, text) for flag, text in told["problems"]]
    message = told["message"].removeprefix(f"{told['flag']}: ")
    return ConfigError(told["flag"], message, problems)
