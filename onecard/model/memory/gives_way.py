"""Work on a plan that is left when somebody waits for something else. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class GaveWay(BaseException):
    """A trace that was not made, because somebody waits for something else. No error of any model's code."""


# Asked before each trace and each of its operations: whether to give way. Traces that were made before are kept.
GIVES_WAY: ContextVar[Callable[[], bool]] = ContextVar("GIVES_WAY", default=bool)
