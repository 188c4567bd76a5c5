"""The other end of `worker.py`: reads questions, a line of JSON each, and writes the answers.

While nobody asks, it computes what is likely to be asked next.
"""

from __future__ import annotations

import io
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from typing import Any, TextIO

from onecard.console import error, quiet_libraries
from onecard.errors import ConfigError, OneCardError
from onecard.studio import data_reading, planning
from onecard.translation import use_language

QUESTIONS: dict[str, Callable[..., Any]] = {
    "read": data_reading.read_data,
    "tokens": data_reading.tokens_of,
    "plan": planning.plan,
    "limits": planning.limits,
    "machine": planning.machine,
}
PREPARED: dict[str, Callable[..., Iterator[None]]] = {"plan": planning.prepare}
IDLE_S = 900.0  # then the memory is given back
PAUSE_S = 0.1  # after a plan: between two questions of a slider that is being moved nothing else is begun
WARNING = "warning: "
END = object()


def main() -> None:
    """Answer until the input ends, or nothing was asked for `IDLE_S` seconds."""
    use_language("en")  # the page has its own
    quiet_libraries()
    answers = _own_output()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    is_awaited = threading.Event()
    threading.Thread(target=_read, args=(lines, is_awaited), daemon=True).start()
    ahead: Iterator[None] = iter(())
    wait = IDLE_S
    while True:
        is_awaited.clear()
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            if wait == IDLE_S:
                return
            wait = IDLE_S if _go_on(ahead, is_awaited) is END else 0
            continue
        if not line:
            return
        message = json.loads(line)
        name, arguments = message["question"], message["arguments"]
        answers.write(json.dumps(answer(name, arguments)) + "\n")
        answers.flush()
        if name in PREPARED:
            ahead, wait = PREPARED[name](**arguments), PAUSE_S


def _go_on(ahead: Iterator[None], is_awaited: threading.Event) -> object:
    """Compute a little, or as much of it as can be done until somebody waits for a plan. END: there is no more."""
    from onecard.model.memory.extrapolate import GIVES_WAY, GaveWay

    before = GIVES_WAY.set(is_awaited.is_set)
    try:
        return next(ahead, END)
    except GaveWay:
        return None  # the plan that waits has others prepared after it
    finally:
        GIVES_WAY.reset(before)


def answer(question: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """{"result"} or {"error"}; warnings that came up are in the result, as `warnings`."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            result = QUESTIONS[question](**arguments)
    except ConfigError as reason:
        return {"error": {"kind": "ConfigError", "message": str(reason), "flag": reason.flag,
                          "problems": list(reason.problems)}}  # fmt: skip
    except OneCardError as reason:
        return {"error": {"kind": type(reason).__name__, "message": str(reason)}}
    except Exception as reason:
        told = f"this was not foreseen: {type(reason).__name__}: {reason}"
        error(f"{told}\n{said.getvalue()}{traceback.format_exc()}")  # for the terminal
        return {"error": {"kind": "OneCardError", "message": told}}
    result["warnings"] = [line.removeprefix(WARNING) for line in said.getvalue().splitlines() if WARNING in line]
    return {"result": result}


def _own_output() -> TextIO:
    """The pipe to the studio; whatever else is printed here goes to the terminal."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    return answers


def _read(lines: queue.SimpleQueue[str], is_awaited: threading.Event) -> None:
    for line in sys.stdin:
        lines.put(line)
        if json.loads(line)["question"] in PREPARED:
            is_awaited.set()
    lines.put("")


if __name__ == "__main__":
    main()
