"""Arithmetic on small numbers, told as a table in figures and asked in words."""

from __future__ import annotations

from .core import Example, Task, from_table, worded


def _sum(a: int, b: int) -> Example:
    total = str(a + b)
    return worded("sum", f"{a}+{b}", total, a=a, b=b, total=total)


def _difference(a: int, b: int) -> Example:
    rest = str(a - b)
    return worded("difference", f"{a}-{b}", rest, a=a, b=b, rest=rest)


def tasks() -> list[Task]:
    """One, two or three added to a number up to ten, and taken from it."""
    sums = [_sum(a, b) for a in range(1, 11) for b in (1, 2, 3)]
    differences = [_difference(a, b) for a in range(2, 11) for b in (1, 2, 3) if b < a]
    return [
        Task("sum", from_table(sums), knowledge=True),
        Task("difference", from_table(differences), knowledge=True, weight=0.7),
    ]
