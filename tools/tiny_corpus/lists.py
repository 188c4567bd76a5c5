"""Questions about a list that stands in the input: its first, its last, how many, and backwards."""

from __future__ import annotations

import random
from collections.abc import Callable

from .core import Example, Task
from .vocabulary import NOUNS


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return [noun.english for noun in rng.sample(NOUNS, rng.randint(low, high))]


def _words_zh(rng: random.Random, low: int, high: int) -> list[str]:
    return [noun.chinese for noun in rng.sample(NOUNS, rng.randint(low, high))]


def _pick(rng: random.Random, last: bool) -> Example:
    words = _words(rng, 3, 5)
    which, answer = ("last", words[-1]) if last else ("first", words[0])
    listed = ", ".join(words)
    return Example(
        key=listed,
        answer=answer,
        statements=(
            f"List: {listed}. The {which} word is {answer}.",
            f"{listed}. Here the {which} is {answer}.",
            f"In {listed} the {which} word is {answer}.",
        ),
        questions=(
            (f"{listed}. What is the {which} word?", ""),
            (f"What is the {which} word of {listed}?", ""),
            (f"What is the {which} word?", listed),
            (f"What is the {which} of these?", listed),
            (f"Name the {which} item: {listed}", ""),
            (f"Name the {which} item.", listed),
            (f"Which item of the list is {which}?", listed),
            (f"Say what stands {which}.", listed),
        ),
        rows=((f"Give the {which} item of the list.", listed), (f"Which word stands {which}?", listed)),
    )


def _pick_zh(rng: random.Random, last: bool) -> Example:
    words = _words_zh(rng, 3, 5)
    which, answer = ("最后", words[-1]) if last else ("第", words[0])
    listed = "、".join(words)
    return Example(
        key=listed,
        answer=answer,
        statements=(
            f"列表:{listed}。{which}一个词是{answer}。",
            f"{listed}。{which}一个是 {answer}。",
            f"在{listed}中,{which}一个词是{answer}。",
        ),
        questions=(
            (f"{listed}。{which}一个词是什么?", ""),
            (f"在{listed}中,{which}一个是什么?", ""),
            (f"{which}一个词是什么?", listed),
            (f"{which}一个是什么?", listed),
            (f"写出{which}一个词。", listed),
            (f"{which}一项是什么?", listed),
            (f"列表的{which}一个词语是哪个?", listed),
        ),
        rows=((f"写出列表里的{which}一项。", listed), (f"请找出{which}一个词语。", listed)),
    )


def _reverse(rng: random.Random) -> Example:
    words = _words(rng, 2, 3)
    listed, answer = ", ".join(words), ", ".join(reversed(words))
    return Example(
        key=listed,
        answer=answer,
        statements=(
            f"List: {listed}. Backwards: {answer}.",
            f"{listed} read backwards is {answer}.",
            f"{listed}. The reverse is {answer}.",
        ),
        questions=(
            (f"What is {listed} backwards?", ""),
            (f"{listed}. Backwards?", ""),
            ("What is this backwards?", listed),
            ("Backwards?", listed),
            ("Reverse it.", listed),
            ("Say these words in reverse order.", listed),
            ("Give the list backwards.", listed),
            ("Write this in reverse.", listed),
        ),
        rows=(("Reverse the order of the words.", listed), ("Write the list in reverse.", listed)),
    )


def _count(rng: random.Random) -> Example:
    words = _words(rng, 1, 5)
    listed, answer = ", ".join(words), str(len(words))
    return Example(
        key=listed,
        answer=answer,
        statements=(
            f"List: {listed}. Number of words: {answer}.",
            f"{listed}. That makes {answer} words.",
            f"In {listed} there are {answer} words.",
        ),
        questions=(
            (f"How many words are in {listed}?", ""),
            (f"{listed}. How many words?", ""),
            ("How many words?", listed),
            ("How many words are in it?", listed),
            ("Count them.", listed),
            ("Count these words.", listed),
            ("What is the length of this list?", listed),
        ),
        rows=(("Count the words in the list.", listed), ("Tell me the length of the list.", listed)),
    )


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
