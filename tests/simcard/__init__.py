"""A simulated CUDA card for the tests; see README.md in this folder."""

from __future__ import annotations

import sys


def is_simulated() -> bool:
    """Whether the card of this process is the simulated one."""
    return "onecard_simcard" in sys.modules
