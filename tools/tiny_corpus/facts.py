"""Facts of the world: capitals, the order of days and months. Each is a table and its wordings."""

from __future__ import annotations

from .core import Task, from_table, worded
from .vocabulary import read_table

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS = tuple("January February March April May June July August September October November December".split())
MONTHS_ZH = ("一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月")


def _neighbours(names: tuple[str, ...]) -> list[tuple[str, str, bool]]:
    """Each name with the one after it (True) and the one before it (False), around the circle."""
    pairs = []
    for index, name in enumerate(names):
        pairs.append((name, names[(index + 1) % len(names)], True))
        pairs.append((name, names[index - 1], False))
    return pairs


def tasks() -> list[Task]:
    """Capitals and calendar, in English and in Chinese."""
    capitals = read_table("capitals")
    order = [
        worded("order", f"{here} {word}", there, here=here, kind=kind, there=there, word=word)
        for names, kind in ((DAYS, "day"), (MONTHS, "month"))
        for here, there, later in _neighbours(names)
        for word in ("after" if later else "before",)
    ]
    order_zh = [
        worded("order_zh", f"{here} {word}", there, here=here, kind=kind, there=there, word=word)
        for names, kind in ((DAYS_ZH, "天"), (MONTHS_ZH, "个月"))
        for here, there, later in _neighbours(names)
        for word in ("后" if later else "前",)
    ]
    english = [worded("capital", country, city, city=city, country=country) for country, _, city, _ in capitals]
    chinese = [worded("capital_zh", key, city, city=city, country=country) for key, country, _, city in capitals]
    return [
        Task("capital", from_table(english), knowledge=True, family="capital"),
        Task("capital_zh", from_table(chinese), knowledge=True, family="capital"),
        Task("calendar", from_table(order), knowledge=True),
        Task("calendar_zh", from_table(order_zh), knowledge=True),
    ]
