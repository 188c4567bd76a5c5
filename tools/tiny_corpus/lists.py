"""Questions about a list that stands in the input: its first, its last, how many, and backwards."""

from __future__ import annotations

import random
from collections.abc import Callable

from .core import Example, Task, worded
from .vocabulary import NOUNS


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return [noun.english for noun in rng.sample(NOUNS, rng.randint(low, high))]


def _words_zh(rng: random.Random, low: int, high: int) -> list[str]:
    return [noun.chinese for noun in rng.sample(NOUNS, rng.randint(low, high))]


def _pick(rng: random.Random, last: bool) -> Example:
    words = _words(rng, 3, 5)
    which, answer = ("last", words[-1]) if last else ("first", words[0])
    listed = ", ".join(words)
    return worded("pick", listed, answer, listed=listed, which=which)


def _pick_zh(rng: random.Random, last: bool) -> Example:
    words = _words_zh(rng, 3, 5)
    which, answer = ("最后", words[-1]) if last else ("第", words[0])
    listed = "、".join(words)
    return worded("pick_zh", listed, answer, listed=listed, which=which)


def _reverse(rng: random.Random) -> Example:
    words = _words(rng, 2, 3)
    listed, answer = ", ".join(words), ", ".join(reversed(words))
    return worded("reverse", listed, answer, listed=listed)


def _count(rng: random.Random) -> Example:
    words = _words(rng, 1, 5)
    listed, answer = ", ".join(words), str(len(words))
    return worded("count", listed, answer, listed=listed)


def _task(name: str, draw: Callable[[random.Random], Example], weight: float = 1.5) -> Task:
    return Task(name, draw, knowledge=False, weight=weight, family="lists")


def tasks() -> list[Task]:
    """Every list task; they share one split, so a held-out list is held out for all of them."""
    return [
        _task("list_first", lambda rng: _pick(rng, False)),
        _task("list_last", lambda rng: _pick(rng, True)),
        _task("list_first_zh", lambda rng: _pick_zh(rng, False)),
        _task("list_last_zh", lambda rng: _pick_zh(rng, True)),
        _task("list_reverse", _reverse),
        _task("list_count", _count),
    ]
