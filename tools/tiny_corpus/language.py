"""Knowledge of words: translation, opposites, plurals, past tense, categories, Chinese measure words."""

from __future__ import annotations

from .core import Example, Task, from_table, worded
from .vocabulary import NOUNS, PAIRS, Noun, read_pairs


def _to_chinese(english: str, chinese: str) -> Example:
    return worded("to_chinese", english, chinese, chinese=chinese, english=english)


def _to_english(chinese: str, english: str) -> Example:
    return worded("to_english", english, english, chinese=chinese, english=english)


def _opposite(word: str, other: str) -> Example:
    return worded("opposite", " ".join(sorted((word, other))), other, other=other, word=word)


def _opposite_zh(word: str, other: str) -> Example:
    return worded("opposite_zh", " ".join(sorted((word, other))), other, other=other, word=word)


def _plural(word: str, plural: str) -> Example:
    return worded("plural", word, plural, plural=plural, word=word)


def _past(verb: str, past: str) -> Example:
    return worded("past", verb, past, past=past, verb=verb)


def _category(noun: Noun) -> Example:
    word, kind = noun.english, noun.category
    return worded("category", word, kind, kind=kind, word=word)


def _category_zh(noun: Noun) -> Example:
    word, kind = noun.chinese, noun.category_zh
    return worded("category_zh", noun.english, kind, kind=kind, word=word)


def _measure(noun: Noun) -> Example:
    word, measure = noun.chinese, noun.measure
    return worded("measure", noun.english, measure, measure=measure, word=word)


def tasks() -> list[Task]:
    """Every task about words."""
    both = [pair for a, b in read_pairs("opposites") for pair in ((a, b), (b, a))]
    opposites = dict(reversed(both))
    both_zh = [pair for a, b in read_pairs("opposites_zh") for pair in ((a, b), (b, a))]
    measured = [noun for noun in NOUNS if noun.measure]
    return [
        Task("to_chinese", from_table([_to_chinese(*p) for p in PAIRS]), True, 2.0, family="translate"),
        Task("to_english", from_table([_to_english(b, a) for a, b in PAIRS]), True, 2.0, family="translate"),
        Task("opposite", from_table([_opposite(a, b) for a, b in opposites.items()]), True),
        Task("opposite_zh", from_table([_opposite_zh(a, b) for a, b in both_zh]), True),
        Task("plural", from_table([_plural(*p) for p in read_pairs("plurals")]), True),
        Task("past_tense", from_table([_past(*p) for p in read_pairs("past_tenses")]), True),
        Task("category", from_table([_category(n) for n in NOUNS]), True, 1.2, family="category"),
        Task("category_zh", from_table([_category_zh(n) for n in NOUNS]), True, 1.2, family="category"),
        Task("measure_zh", from_table([_measure(n) for n in measured]), True, 1.2),
    ]
