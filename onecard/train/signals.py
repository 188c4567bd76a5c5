"""Ctrl-C and SIGTERM as requests that the loop carries out at the end of the step.

The first signal sets `requested`; the loop looks at it between steps, saves and leaves. The second one leaves at
once. Knows nothing of steps or checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Literal

from onecard.console import quiet_rank, warn

# Windows ends a console program with SIGBREAK where others send SIGTERM.
_MEANING: dict[str, Literal["SIGINT", "SIGTERM"]] = {"SIGINT": "SIGINT", "SIGTERM": "SIGTERM", "SIGBREAK": "SIGTERM"}
_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class Interrupts:
    """Context manager that turns the first SIGINT or SIGTERM into `requested` and lets the second one end the process.

    `same_request_s`: signals so soon after the first are the same wish. A terminal's Ctrl-C reaches torchrun *and* its
    workers, and torchrun then signals the workers again; that must not cost the checkpoint.

    Outside the main thread Python allows no handlers, so nothing is installed and `requested` stays None.
    """

    def __init__(self, *, same_request_s: float = 0.3) -> None:
        self.requested: Literal["SIGINT", "SIGTERM"] | None = None
        self._same_request_s = same_request_s
        self._first_time_s = 0.0
        self._old_handlers: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 when nothing was asked for."""
        return _EXIT_CODES[self.requested] if self.requested else 0

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (getattr(signal, name, None) for name in _MEANING):
            if number is not None:
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            # None: the old handler was installed by C code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old_handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = _MEANING[signal.Signals(number).name]
        if self.requested is None:
            self._first_time_s = time.monotonic()  # first: a second signal may come between these two lines
            self.requested = name
            # The signal may have come in the middle of a print, which Python does not let us enter again.
            with contextlib.suppress(Exception):
                if not quiet_rank():
                    warn(f"{name}: finishing this step and saving; once more leaves at once")
        elif time.monotonic() - self._first_time_s >= self._same_request_s:
            os._exit(_EXIT_CODES[name])
