"""Knowledge of words: translation, opposites, plurals, past tense, categories, Chinese measure words."""

from __future__ import annotations

from .core import Task, from_table, worded
from .vocabulary import NOUNS, PAIRS, read_pairs


def tasks() -> list[Task]:
    """Every task about words."""
    both = [pair for a, b in read_pairs("opposites") for pair in ((a, b), (b, a))]
    opposites = dict(reversed(both))
    both_zh = [pair for a, b in read_pairs("opposites_zh") for pair in ((a, b), (b, a))]
    measured = [noun for noun in NOUNS if noun.measure]
    to_chinese = [worded("to_chinese", en, zh, chinese=zh, english=en) for en, zh in PAIRS]
    to_english = [worded("to_english", en, en, chinese=zh, english=en) for en, zh in PAIRS]
    opposite = [worded("opposite", _either(a, b), b, other=b, word=a) for a, b in opposites.items()]
    opposite_zh = [worded("opposite_zh", _either(a, b), b, other=b, word=a) for a, b in both_zh]
    plural = [worded("plural", word, plural, plural=plural, word=word) for word, plural in read_pairs("plurals")]
    past = [worded("past", verb, past, past=past, verb=verb) for verb, past in read_pairs("past_tenses")]
    category = [worded("category", n.english, n.category, kind=n.category, word=n.english) for n in NOUNS]
    category_zh = [worded("category_zh", n.english, n.category_zh, kind=n.category_zh, word=n.chinese) for n in NOUNS]
    measure = [worded("measure", n.english, n.measure, measure=n.measure, word=n.chinese) for n in measured]
    return [
        Task("to_chinese", from_table(to_chinese), True, 2.0, family="translate"),
        Task("to_english", from_table(to_english), True, 2.0, family="translate"),
        Task("opposite", from_table(opposite), True),
        Task("opposite_zh", from_table(opposite_zh), True),
        Task("plural", from_table(plural), True),
        Task("past_tense", from_table(past), True),
        Task("category", from_table(category), True, 1.2, family="category"),
        Task("category_zh", from_table(category_zh), True, 1.2, family="category"),
        Task("measure_zh", from_table(measure), True, 1.2),
    ]


def _either(word: str, other: str) -> str:
    """The key of a pair, whichever of the two is asked about."""
    return " ".join(sorted((word, other)))
