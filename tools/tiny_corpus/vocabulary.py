"""The words that the tasks share: English, Chinese, category and, for nouns, the Chinese measure word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun that belongs to a category. `measure` is empty where Chinese counts it otherwise."""

    english: str
    chinese: str
    category: str
    category_zh: str
    measure: str


def read_table(name: str) -> list[tuple[str, ...]]:
    """Rows of `tables/NAME.txt`: fields between spaces, `_` for a space inside a field, `#` for a comment."""
    text = (Path(__file__).parent / "tables" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(field.replace("_", " ") for field in line.split()) for line in lines]


def read_pairs(name: str) -> list[tuple[str, str]]:
    """The same, for a table of two fields."""
    return [(left, right) for left, right in read_table(name)]


NOUNS = tuple(Noun(*(field.strip("-") for field in fields)) for fields in read_table("nouns"))
PAIRS = (*((noun.english, noun.chinese) for noun in NOUNS), *read_pairs("words"))
NAMES = tuple("Tom Anna Peter Lucy Jack Mary David Emma Paul Nina Sam Kate Leo Rose Ben Alice".split())
NAMES_ZH = ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小李", "小王", "小张", "小林", "小陈", "小美")

CHINESE_WORDS = frozenset(
    (
        *(chinese for _, chinese in PAIRS),
        *NAMES_ZH,
        *(row[0] for row in read_table("chinese_pieces")),
    )
)
"""Where the tokenizer's training text is cut, so that no piece joins two words."""
