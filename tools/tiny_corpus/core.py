"""What a task of the generated corpus is, and the one rule that keeps train and held-out questions apart.

Knows nothing of any single task, of tokenizers or of prompt templates.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

HELD_OUT_ONE_IN = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to know or to work out, said in every way the project says it.

    `statements` and `questions` are the wordings of the base corpus, a question being (question, what it is asked
    about); `rows` are the (instruction, input) wordings of the sample files. The two never share a wording, so
    fine-tuning has something to teach.
    """

    key: str
    """What the split looks at: the same key is on the same side in every wording and every language of its task."""
    answer: str
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question. `knowledge` separates what must be read somewhere from what can be worked out."""

    name: str
    draw: Callable[[random.Random], Example]
    knowledge: bool
    """True: the corpus tells held-out items too, as statements only. False: held-out inputs never reach the corpus."""
    weight: float = 1.0
    """Share of the corpus, relative to the other tasks."""
    asked: bool = True
    """False: all its rows go to training and none is held out (there is only one way to greet)."""
    family: str = ""
    """Tasks of one family share the split of their keys; empty means the task stands alone."""


def is_held_out(task: Task, example: Example) -> bool:
    """Tell the side of the split: one key in five is held out, by hash, so it needs no stored list."""
    name = f"{task.family or task.name}|{example.key}"
    return hashlib.sha256(name.encode("utf-8")).digest()[0] % HELD_OUT_ONE_IN == 0


def from_table(examples: Sequence[Example]) -> Callable[[random.Random], Example]:
    """Draw uniformly from a finite list of examples."""
    table = tuple(examples)
    return lambda rng: rng.choice(table)


def worded(kind: str, key: str, answer: str, /, **values: object) -> Example:
    """An example in the wordings that `tables/wordings.yaml` has for its kind."""
    texts = {part: [(asked.format(answer=answer, **values), about.format(**values)) for asked, about in listed]
             for part, listed in _wordings()[kind].items()}  # fmt: skip
    statements = tuple(text for text, _ in texts["statements"])
    return Example(key, answer, statements, tuple(texts["questions"]), tuple(texts["rows"]))


@cache
def _wordings() -> dict[str, dict[str, list[tuple[str, str]]]]:
    content = yaml.safe_load((Path(__file__).parent / "tables" / "wordings.yaml").read_text(encoding="utf-8"))
    return {kind: {part: [text.partition(" | ")[::2] for text in texts] for part, texts in parts.items()}
            for kind, parts in content.items()}  # fmt: skip
