"""Reading: take a detail out of a short text, and say whether a remark is kind or not."""

from __future__ import annotations

import random

from .core import Example, Task, worded
from .facts import DAYS
from .vocabulary import NAMES, NAMES_ZH, NOUNS

_CITIES = tuple("Paris Berlin Rome Madrid Moscow Beijing Tokyo Cairo Athens Vienna Oslo London Lima Seoul".split())
_CITIES_ZH = ("巴黎", "柏林", "罗马", "北京", "东京", "开罗", "雅典", "伦敦", "首尔", "莫斯科", "曼谷", "河内")
_JOBS = tuple((n.english, n.chinese) for n in NOUNS if n.category == "job")
_FOODS = tuple((n.english, n.chinese) for n in NOUNS if n.category in ("fruit", "vegetable"))

_THINGS = tuple("film book food hotel song room coffee soup story shop trip game cake music".split())
_THINGS_ZH = ("电影", "书", "菜", "酒店", "歌曲", "房间", "咖啡", "汤", "故事", "商店", "旅行", "游戏", "蛋糕", "音乐")
_KIND = ("great", "wonderful", "lovely", "excellent", "nice", "perfect", "beautiful", "delightful")
_UNKIND = ("terrible", "awful", "bad", "boring", "horrible", "poor", "ugly", "disappointing")
_KIND_ZH = ("很好", "太棒了", "非常精彩", "让人喜欢", "很完美", "令人满意")
_UNKIND_ZH = ("很差", "太糟糕了", "非常无聊", "让人讨厌", "很失败", "令人失望")


def _detail(rng: random.Random) -> Example:
    name, city, day = rng.choice(NAMES), rng.choice(_CITIES), rng.choice(DAYS)
    job, food = rng.choice(_JOBS)[0], rng.choice(_FOODS)[0]
    text = f"{name} lives in {city}, works as a {job} and buys one {food} every {day}."
    label, asked, row, answer = rng.choice(
        (
            ("city", f"Where does {name} live?", "In which city does this person live?", city),
            ("job", f"What is the job of {name}?", "What work does this person do?", job),
            ("food", f"What does {name} buy?", "What does this person buy?", food),
            ("day", f"When does {name} buy it?", "On which day does this person go shopping?", day),
            ("name", "Who is this about?", "What is this person called?", name),
        )
    )
    return worded("detail", text, answer, asked=asked, label=label, row=row, text=text)


def _detail_zh(rng: random.Random) -> Example:
    name, city = rng.choice(NAMES_ZH), rng.choice(_CITIES_ZH)
    job, food = rng.choice(_JOBS)[1], rng.choice(_FOODS)[1]
    text = f"{name}住在{city},是一位{job},喜欢吃{food}。"
    label, asked, row, answer = rng.choice(
        (
            ("城市", f"{name}住在哪里?", "这个人住在哪个城市?", city),
            ("职业", f"{name}是做什么的?", "这个人的工作是什么?", job),
            ("食物", f"{name}喜欢吃什么?", "这个人爱吃的东西是什么?", food),
            ("名字", "这里说的是谁?", "这个人叫什么?", name),
        )
    )
    return worded("detail_zh", text, answer, asked=asked, label=label, row=row, text=text)


def _mood(rng: random.Random) -> Example:
    kind = rng.random() < 0.5
    thing, word = rng.choice(_THINGS), rng.choice(_KIND if kind else _UNKIND)
    start = rng.choice(("I think the", "We found that the", "Everyone says the", "Yesterday the", "To me the"))
    text, answer = f"{start} {thing} was {word}.", "positive" if kind else "negative"
    return worded("mood", text, answer, text=text)


def _mood_zh(rng: random.Random) -> Example:
    kind = rng.random() < 0.5
    thing, word = rng.choice(_THINGS_ZH), rng.choice(_KIND_ZH if kind else _UNKIND_ZH)
    start = rng.choice(("我觉得", "大家都说", "昨天发现", "我们认为", "说实话,"))
    whose = rng.choice(("这次的", "他们的", "那里的"))
    text, answer = f"{start}{whose}{thing}{word}。", "好评" if kind else "差评"
    return worded("mood_zh", text, answer, text=text)


def tasks() -> list[Task]:
    """Details and moods, in English and in Chinese."""
    return [
        Task("detail", _detail, knowledge=False, weight=3.0),
        Task("detail_zh", _detail_zh, knowledge=False, weight=3.0),
        Task("mood", _mood, knowledge=False, weight=0.6),
        Task("mood_zh", _mood_zh, knowledge=False, weight=0.6),
    ]
