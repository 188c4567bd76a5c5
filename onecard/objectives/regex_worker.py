"""The checker regex of --reward as a function that reward_worker.py can run, so that a pattern which backtracks
without end takes nothing with it. Imports nothing but the standard library.
"""

from __future__ import annotations

import re


def search(answer: str, row: str) -> float:
    """1.0 where the pattern `row` is found in the answer, else 0.0."""
    return float(re.search(row, answer) is not None)
