"""The other end of `worker.py`: reads questions, a line of JSON each, and writes the answers.

While nobody asks, it computes what is likely to be asked next.
"""

from __future__ import annotations

import io
import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any, TextIO

from onecard.console import error, quiet_libraries
from onecard.errors import ConfigError, OneCardError
from onecard.model.memory.gives_way import GIVES_WAY, GaveWay
from onecard.studio import data_reading, planning
from onecard.studio.worker import GAVE_WAY
from onecard.translation import use_language

QUESTIONS: dict[str, Callable[..., Any]] = {
    "read": data_reading.read_data,
    "tokens": data_reading.tokens_of,
    "plan": planning.plan,
    "plan_at_once": planning.plan_at_once,
    "limits": planning.limits,
    "machine": planning.machine,
}
PREPARED: dict[str, Callable[..., Iterator[None]]] = {"plan": planning.prepare, "plan_at_once": planning.prepare}
PATIENT = "limits"  # asked again and again while they are found: it interrupts nothing
IDLE_S = 900.0  # then the memory is given back
PAUSE_S = 0.1  # after a plan: between two questions of a slider that is being moved nothing else is begun
END = object()


class QuestionQueue:
    """The questions that wait, and whether what is done meanwhile should give way to them."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._n_came = self._n_taken = 0  # of those that are urgent; each is counted by one thread
        self._newest_interruption = self._newest_taken = -1

    def read(self, stream: Iterable[str]) -> None:
        """Put in what comes until the stream ends. {"interrupt": n} is for question n, if that is being answered."""
        for line in stream:
            message = json.loads(line)
            if "interrupt" in message:
                self._newest_interruption = message["interrupt"]
                continue
            self._n_came += message["question"] != PATIENT
            self._lines.put(message)
        self._lines.put(None)

    def take(self, timeout: float) -> dict[str, Any] | None:
        """The next question; None at the end. Raises queue.Empty after so many seconds."""
        message = self._lines.get(timeout=timeout)
        if message is not None:
            self._n_taken += message["question"] != PATIENT
            self._newest_taken = message.get("number", -1)
        return message

    def somebody_waits(self) -> bool:
        """Whether work done ahead should give way: to an urgent question, or to one that keeps another from coming."""
        return self._n_came > self._n_taken or self._newest_interruption > self._newest_taken

    def is_interrupted(self, number: int) -> bool:
        """Whether this question should give way."""
        return number <= self._newest_interruption


def main() -> None:
    """Answer until the input ends, or nothing was asked for `IDLE_S` seconds."""
    use_language("en")  # the page has its own
    quiet_libraries()
    answers, inbox = _own_output(), QuestionQueue()
    threading.Thread(target=inbox.read, args=(sys.stdin,), daemon=True).start()
    begin_ahead: Callable[[], Iterator[None]] = partial(iter, ())
    ahead, wait = begin_ahead(), IDLE_S
    while True:
        try:
            message = inbox.take(wait)
        except queue.Empty:
            if wait == IDLE_S:
                return
            done = go_on(ahead, inbox.somebody_waits)
            if done is GAVE_WAY:  # what it has made is kept
                ahead = begin_ahead()
            wait = IDLE_S if done is END else 0
            continue
        if message is None:
            return
        name, arguments = message["question"], message["arguments"]
        with giving_way(partial(inbox.is_interrupted, message.get("number", math.inf))):
            answers.write(json.dumps(answer(name, arguments)) + "\n")
        answers.flush()
        if name in PREPARED:
            begin_ahead = partial(PREPARED[name], **arguments)
            ahead, wait = begin_ahead(), PAUSE_S


@contextmanager
def giving_way(gives_way: Callable[[], bool]) -> Iterator[None]:
    """Within it a plan raises `simulate.GaveWay` as soon as this says so."""
    before = GIVES_WAY.set(gives_way)
    try:
        yield
    finally:
        GIVES_WAY.reset(before)


def go_on(ahead: Iterator[None], somebody_waits: Callable[[], bool]) -> object:
    """Compute a little. GAVE_WAY: somebody waited before it was done; END: there is no more."""
    try:
        with giving_way(somebody_waits):
            return next(ahead, END)
    except GaveWay:
        return GAVE_WAY


def answer(question: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """{"result"} or {"error"}; warnings that came up are in the result, as `warnings`."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            result = QUESTIONS[question](**arguments)
    except ConfigError as reason:
        return {"error": {"kind": "ConfigError", "message": str(reason), "flag": reason.flag,
                          "problems": list(reason.problems)}}  # fmt: skip
    except GaveWay:
        return {GAVE_WAY: True}
    except OneCardError as reason:
        return {"error": {"kind": type(reason).__name__, "message": str(reason)}}
    except Exception as reason:
        message = f"this was not foreseen: {type(reason).__name__}: {reason}"
        error(f"{message}\n{said.getvalue()}{traceback.format_exc()}")  # for the terminal
        return {"error": {"kind": "OneCardError", "message": message}}
    warnings = planning.warnings_in(said.getvalue())
    return {"result": {**result, "warnings": [*result.get("warnings", []), *warnings]}}


def _own_output() -> TextIO:
    """The pipe to the studio; whatever else is printed here goes to the terminal."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    return answers


if __name__ == "__main__":
    main()
