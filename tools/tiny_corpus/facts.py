"""Facts of the world: capitals, the order of days and months. Each is a table and its wordings."""

from __future__ import annotations

from .core import Example, Task, from_table, worded
from .vocabulary import read_table

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS = tuple("January February March April May June July August September October November December".split())
MONTHS_ZH = ("一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月")


def _capital(country: str, city: str) -> Example:
    return worded("capital", country, city, city=city, country=country)


def _capital_zh(country: str, city: str, key: str) -> Example:
    return worded("capital_zh", key, city, city=city, country=country)


def _order(here: str, there: str, word: str, kind: str) -> Example:
    return worded("order", f"{here} {word}", there, here=here, kind=kind, there=there, word=word)


def _order_zh(here: str, there: str, word: str, kind: str) -> Example:
    return worded("order_zh", f"{here} {word}", there, here=here, kind=kind, there=there, word=word)


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
        _order(a, b, "after" if later else "before", kind)
        for names, kind in ((DAYS, "day"), (MONTHS, "month"))
        for a, b, later in _neighbours(names)
    ]
    order_zh = [
        _order_zh(a, b, "后" if later else "前", kind)
        for names, kind in ((DAYS_ZH, "天"), (MONTHS_ZH, "个月"))
        for a, b, later in _neighbours(names)
    ]
    english = [_capital(country, city) for country, _, city, _ in capitals]
    chinese = [_capital_zh(country, city, key) for key, country, _, city in capitals]
    return [
        Task("capital", from_table(english), knowledge=True, family="capital"),
        Task("capital_zh", from_table(chinese), knowledge=True, family="capital"),
        Task("calendar", from_table(order), knowledge=True),
        Task("calendar_zh", from_table(order_zh), knowledge=True),
    ]
