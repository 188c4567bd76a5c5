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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from onecard.errors import ConfigError, DataError, ModelError, OneCardError
from onecard.serve.http_error import ApiError

KINDS = {kind.__name__: kind for kind in (OneCardError, DataError, ModelError)}
GONE = 503
GAVE_WAY = "gave_way"  # the answer to what was interrupted
MOST_ASKERS = 1000  # pages that are remembered


class Worker:
    """One such process, asked by any number of threads, one after the other in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[int] = []
        """Numbers of the questions that wait; the first is being answered."""
        self._interruptible = ""
        """Whose question is being answered that gives way to others; else empty."""
        self._askings, self._turns = count(), count()
        self._newest: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False

    def ask(self, question: str, arguments: dict[str, Any], *, replaces: str = "", gives_way: bool = False) -> Any:
        """The answer. Blocks; what waits with the same `replaces` gives way to what is asked later.

        gives_way: it takes long, and what others ask meanwhile comes first; it then goes on from where it was.
        Raises the OneCardError of the answer, and ApiError: 409 for what gave way, 503 where the process is gone.
        """
        if len(self._newest) > MOST_ASKERS:
            self._newest.clear()
        newest = self._newest[replaces] = next(self._askings)
        while True:
            with self._turn(replaces, gives_way) as number:
                if replaces and newest != self._newest.get(replaces):
                    raise ApiError(409, "a newer question has taken the place of this one", code="superseded")
                answer = self._ask({"question": question, "arguments": arguments, "number": number})
            if answer is not GAVE_WAY:
                return answer

    @contextmanager
    def _turn(self, asker: str, gives_way: bool) -> Iterator[int]:
        """Waits until all who came before have been answered, and interrupts what gives way to this question.

        Two that give way do so to one another only where the asker is the same: else neither would come to its end.
        """
        with self._changed:
            number = next(self._turns)
            self._line.append(number)
            if self._interruptible and (not gives_way or asker == self._interruptible):
                self._write({"interrupt": self._line[0]})
            self._changed.wait_for(lambda: self._line[0] == number)
            self._interruptible = asker if gives_way else ""
        try:
            yield number
        finally:
            with self._changed:
                del self._line[0]
                self._interruptible = ""
                self._changed.notify_all()

    def stop(self) -> None:
        """End the process, whatever it does; the next question begins another one."""
        process = self._process
        if process is not None:
            self._is_stopped = True
            with suppress(OSError):
                process.kill()
            process.wait()

    def _ask(self, message: dict[str, Any]) -> Any:
        with self._changed:  # no interruption in the middle of a line
            process, self._is_stopped = self._running(), False
            self._write(message)
        assert process.stdout is not None
        try:
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
        if GAVE_WAY in answer:
            return GAVE_WAY
        if "error" in answer:
            raise error_of(answer["error"])
        return answer["result"]

    def _write(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:  # an interruption of what has not begun
            return
        with suppress(OSError):  # that it has ended is seen by who reads its answer
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "onecard.studio.worker_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
            )  # fmt: skip
        return self._process


def error_of(error: dict[str, Any]) -> OneCardError:
    """The error that was raised there."""
    if error["kind"] != "ConfigError":
        return KINDS.get(error["kind"], OneCardError)(error["message"])
    problems = [(flag, text) for flag, text in error["problems"]]
    message = error["message"].removeprefix(f"{error['flag']}: ")
    return ConfigError(error["flag"], message, problems)
