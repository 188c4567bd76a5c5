"""Figures of a report: a group of records (in total, a category, a subject, a class) and what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onecard.statistics import Estimate, wilson_interval


@dataclass
class Measure:
    """`values` by name: a number, or an Estimate with its interval."""

    group: str
    name: str
    n: int
    values: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it; an Estimate becomes [value, low, high]."""
        values = {name: rounded(value) for name, value in self.values.items()}
        return {"group": self.group, "name": self.name, "n": self.n, "values": values}


def share(n_right: float, n: int) -> Estimate:
    """A share of records with Wilson's interval; of no records 0 without one."""
    return wilson_interval(n_right, n) if n else Estimate(0.0, 0.0, 1.0)


def rounded(value: Any) -> Any:
    """To 6 digits behind the point, estimates as lists."""
    if isinstance(value, Estimate):
        return [round(part, 6) for part in value]
    return round(value, 6) if isinstance(value, float) else value
