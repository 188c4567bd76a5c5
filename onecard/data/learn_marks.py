"""Keys with which data say what is not to be learned: on one answer of a conversation, or on a whole record.

Knows the keys of other programs and their values. Does not know shapes or turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onecard.data.json_records import NumberText

# OpenAI (weight), axolotl (train, training), ms-swift (loss), and others
MARKS = frozenset(("weight", "loss_weight", "loss", "train", "training", "trainable", "learn"))
# On a whole record "loss" and "learn" have other meanings as well; TRL and LLaMA-Factory mark good and bad answers.
_RECORD_MARKS = ("weight", "loss_weight", "train", "trainable")
LABELS = ("label", "kto_tag")
LARGEST_WEIGHT = 1000.0  # more is a number with another meaning, such as a time
_NO = ("false", "no", "0")
_YES = ("true", "yes", "1", "")

NOT_LEARNED = "an answer marked as not to be learned is read and not learned"
NOT_A_GOOD_ANSWER = "a record marked as not to be learned, or as a bad answer (label: false), is not learned"
WEIGHTED = "an answer with a weight: its loss is multiplied by it"


def learning_weight(turn: Mapping[str, Any], notes: list[str]) -> float:
    """What the loss of an answer is multiplied by, by the marks in its turn; 0: it is not to be learned.

    {"weight": 0.0} or {"train": "false"} -> 0        {"weight": 0.5} -> 0.5        {"train": true} -> 1
    Raises ValueError for a mark that is no weight.
    """
    if MARKS.isdisjoint(turn):
        return 1.0
    marks = {key: _value(turn[key]) for key in sorted(MARKS) if turn.get(key) is not None}
    for key, value in marks.items():
        if value is None or not 0 <= value <= LARGEST_WEIGHT:
            raise ValueError(
                f'"{key}": {str(turn[key])[:40]!r}; 0 or false (not learned), 1 or true, or a weight up to '
                f"{LARGEST_WEIGHT:g}"
            )
    weight = math.prod(value for value in marks.values() if value is not None)
    if weight not in (0, 1):
        notes.append(WEIGHTED)
    elif weight == 0:
        notes.append(NOT_LEARNED)
    return weight


def record_mark(key: str, value: Any) -> bool | None:
    """Whether a field of a record marks it as to be learned; None where the field is no such mark.

    label: false -> False, a bad answer     label: 0 -> None, in other data the name of a class     weight: 0 -> False
    """
    if key in LABELS:
        return {"true": True, "false": False}.get(str(value).strip().lower())
    number = _value(value) if key in _RECORD_MARKS and value is not None else None
    return bool(number) if number in (0, 1) else None


def _value(mark: Any) -> float | None:
    """A mark as a number: false -> 0, "1.0" -> 1, NaN (how pandas writes a missing value) -> 1, others None."""
    if isinstance(mark, str) and not isinstance(mark, NumberText):
        word = mark.strip().lower()
        if word in _NO or word in _YES:
            return float(word in _YES)
    try:
        number = float(mark)
    except (TypeError, ValueError):
        return None
    return 1.0 if number != number else number
