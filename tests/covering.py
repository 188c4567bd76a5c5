"""Cases of a dear test: those in which every two values of two axes meet are fast, the others are marked slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def every_pair_fast(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the axes' values for `pytest.mark.parametrize`; a covering array of strength 2 is fast."""
    cases = list(product(*axes))
    fast = covering(cases)
    return [
        pytest.param(*case, marks=[] if number in fast else [pytest.mark.slow]) for number, case in enumerate(cases)
    ]


def covering(cases: Sequence[Sequence[Any]]) -> set[int]:
    """Numbers of few cases that hold every pair of values of two columns that there is; the next is the one with most.

    https://en.wikipedia.org/wiki/All-pairs_testing
    """
    pairs = [{(i, repr(case[i]), j, repr(case[j])) for i, j in combinations(range(len(case)), 2)} for case in cases]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
