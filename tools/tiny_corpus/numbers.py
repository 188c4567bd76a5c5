"""Arithmetic on small numbers, told as a table in figures and asked in words."""

from __future__ import annotations

from .core import Example, Task, from_table


def _sum(a: int, b: int) -> Example:
    total = str(a + b)
    return Example(
        key=f"{a}+{b}",
        answer=total,
        statements=(
            f"{a} + {b} = {total}",
            f"{a} plus {b} is {total}.",
            f"{a} and {b} make {total}.",
            f"{a}加{b}等于 {total}。",
        ),
        questions=(
            (f"What is {a} plus {b}?", ""),
            (f"{a} + {b} = ?", ""),
            (f"{a}加{b}等于多少?", ""),
            ("How much is this?", f"{a} + {b}"),
            ("等于多少?", f"{a} + {b}"),
            (f"Give the sum of {a} and {b}.", ""),
            (f"计算{a}加{b}。", ""),
            ("Find the sum.", f"{a} + {b}"),
            ("计算结果。", f"{a} + {b}"),
        ),
        rows=(
            (f"Add {a} and {b}.", ""),
            ("Work out the sum.", f"{a} + {b}"),
            (f"请计算{a}加{b}的结果。", ""),
        ),
    )


def _difference(a: int, b: int) -> Example:
    rest = str(a - b)
    return Example(
        key=f"{a}-{b}",
        answer=rest,
        statements=(
            f"{a} - {b} = {rest}",
            f"{a} minus {b} is {rest}.",
            f"{b} taken from {a} leaves {rest}.",
            f"{a}减{b}等于 {rest}。",
        ),
        questions=(
            (f"What is {a} minus {b}?", ""),
            (f"{a} - {b} = ?", ""),
            (f"{a}减{b}等于多少?", ""),
            ("How much is this?", f"{a} - {b}"),
            ("等于多少?", f"{a} - {b}"),
            (f"Take {b} from {a}.", ""),
            (f"计算{a}减{b}。", ""),
            ("Find the difference.", f"{a} - {b}"),
            ("计算结果。", f"{a} - {b}"),
        ),
        rows=(
            (f"Subtract {b} from {a}.", ""),
            ("Work out the difference.", f"{a} - {b}"),
            (f"请计算{a}减{b}的结果。", ""),
        ),
    )


def tasks() -> list[Task]:
    """One, two or three added to a number up to ten, and taken from it."""
    sums = [_sum(a, b) for a in range(1, 11) for b in (1, 2, 3)]
    differences = [_difference(a, b) for a in range(2, 11) for b in (1, 2, 3) if b < a]
    return [
        Task("sum", from_table(sums), knowledge=True),
        Task("difference", from_table(differences), knowledge=True, weight=0.7),
    ]
