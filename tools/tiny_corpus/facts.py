"""Facts of the world: capitals, the order of days and months. Each is a table and its wordings."""

from __future__ import annotations

from .core import Example, Task, from_table
from .vocabulary import read_table

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MONTHS_ZH = ("一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月")


def _capital(country: str, city: str) -> Example:
    return Example(
        key=country,
        answer=city,
        statements=(
            f"The capital of {country} is {city}.",
            f"{country} has the capital {city}.",
            f"{city} is the capital of {country}.",
            f"In {country}, the capital is {city}.",
            f"{country}: capital {city}.",
        ),
        questions=(
            (f"What is the capital of {country}?", ""),
            (f"Which city is the capital of {country}?", ""),
            (f"{country}, capital?", ""),
            ("What is the capital of this country?", country),
            ("Which city is its capital?", country),
            (f"Say the capital of {country}.", ""),
            (f"Write the capital city of {country}.", ""),
            ("Name its capital.", country),
            ("Tell the capital of it.", country),
        ),
        rows=(
            (f"Name the capital city of {country}.", ""),
            (f"Tell me the capital of {country}.", ""),
            ("Give the capital of this country.", country),
        ),
    )


def _capital_zh(country: str, city: str, key: str) -> Example:
    return Example(
        key=key,
        answer=city,
        statements=(
            f"{country}的首都是{city}。",
            f"{city}是{country}的首都。",
            f"说到{country},它的首都是 {city}。",
            f"{country}:首都 {city}。",
        ),
        questions=(
            (f"{country}的首都是哪里?", ""),
            (f"哪个城市是{country}的首都?", ""),
            (f"{country}首都?", ""),
            ("这个国家的首都是哪里?", country),
            ("它的首都是哪个城市?", country),
            (f"说出{country}的首都。", ""),
            (f"{country}的首都叫什么?", ""),
            ("写出它的首都。", country),
            ("说出这个国家的首都。", country),
        ),
        rows=(
            (f"请说出{country}的首都。", ""),
            (f"请告诉我{country}的首都叫什么。", ""),
            ("写出下面这个国家的首都。", country),
        ),
    )


def _order(here: str, there: str, word: str, kind: str) -> Example:
    return Example(
        key=f"{here} {word}",
        answer=there,
        statements=(
            f"The {kind} {word} {here} is {there}.",
            f"{there} comes right {word} {here}.",
            f"Right {word} {here} comes {there}.",
        ),
        questions=(
            (f"What is the {kind} {word} {here}?", ""),
            (f"What comes {word} {here}?", ""),
            (f"What is the {kind} {word} this one?", here),
            (f"What comes {word} this?", here),
            (f"Tell me the {kind} {word} {here}.", ""),
            (f"Which {kind} is {word} {here}?", ""),
            (f"Give the {kind} right {word} it.", here),
        ),
        rows=(
            (f"Which {kind} comes right {word} {here}?", ""),
            (f"Name the {kind} that comes {word} the given one.", here),
        ),
    )


def _order_zh(here: str, there: str, word: str, kind: str) -> Example:
    return Example(
        key=f"{here} {word}",
        answer=there,
        statements=(
            f"{here}的{word}一个是{there}。",
            f"{here}{word}面是 {there}。",
            f"在{here}{word}面的是{there}。",
        ),
        questions=(
            (f"{here}的{word}一个是什么?", ""),
            (f"{here}{word}面是什么?", ""),
            (f"它的{word}一个是什么?", here),
            (f"它{word}面是什么?", here),
            (f"说出{here}{word}面的一{kind}。", ""),
            (f"{here}的{word}一{kind}是什么?", ""),
            (f"写出它的{word}一{kind}。", here),
        ),
        rows=(
            (f"请说出{here}的{word}一{kind}。", ""),
            (f"写出所给日期的{word}一{kind}。", here),
        ),
    )


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
