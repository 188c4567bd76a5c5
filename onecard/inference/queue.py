"""First come first served: who waits for the model, and how many are in front of whom.

Knows tickets and threads. It does not know models or requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from onecard.errors import OneCardError

LOOK_SECONDS = 0.05  # how soon a waiting request notices that it was cancelled
PLACE_SECONDS = 0.5  # how often it tells its place


class QueueFull(OneCardError):
    """Nobody more may wait. `retry_after_seconds` is a guess from how long the last requests took."""

    def __init__(self, n_waiting: int, retry_after_seconds: int) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(
            f"the model is busy and {n_waiting} requests are waiting already; try again in "
            f"{retry_after_seconds} seconds (--max_queue sets how many may wait)"
        )


class RequestQueue:
    """Lets `at_once` requests in at a time, in the order in which they came; at most `max_waiting` wait."""

    def __init__(self, max_waiting: int, at_once: int = 1) -> None:
        self._max_waiting, self._at_once = max_waiting, at_once
        self._line: list[object] = []  # the first ones are inside
        self._changed = threading.Condition()
        self._seconds_each = 5.0

    def join(self) -> object:
        """A ticket; give it back with `leave`, whatever happens. Raises QueueFull."""
        ticket = object()
        with self._changed:
            n_waiting = max(len(self._line) - self._at_once, 0)
            if len(self._line) >= self._at_once and n_waiting >= self._max_waiting:
                rounds = len(self._line) / self._at_once
                raise QueueFull(n_waiting, max(1, round(self._seconds_each * rounds)))
            self._line.append(ticket)
        return ticket

    def wait(self, ticket: object, cancel: threading.Event) -> Iterator[int]:
        """How many are in front, about twice a second, until it is this ticket's turn or `cancel` is set."""
        reported_at = 0.0
        while not cancel.is_set():
            with self._changed:
                place = self._line.index(ticket) - self._at_once + 1
                if place <= 0:
                    return
                self._changed.wait(LOOK_SECONDS)
            if time.monotonic() - reported_at >= PLACE_SECONDS:
                reported_at = time.monotonic()
                yield place

    def leave(self, ticket: object, seconds: float = 0.0) -> None:
        """Let the next one in; `seconds` is how long this one was inside, 0 if it never was."""
        with self._changed:
            self._line.remove(ticket)
            if seconds:
                self._seconds_each += (seconds - self._seconds_each) / 4
            self._changed.notify_all()

    @property
    def n_waiting(self) -> int:
        """Requests that wait, those inside not counted."""
        with self._changed:
            return max(len(self._line) - self._at_once, 0)
