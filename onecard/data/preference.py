"""Preference pairs ("chosen", "rejected") as two records of known shapes, one for each side.

Knows the forms of TRL (texts, messages, whole conversations), LLaMA-Factory (one answer as an object) and Anthropic's
hh-rlhf (whole dialogues as text). Does not know turns (formats.py reads both sides).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from onecard.data.columns import TURN_LISTS
from onecard.data.turn_objects import role_of
from onecard.data.values import UnusableRecord, kind_of

CHOSEN_LEARNED = "of preference pairs the chosen answers are learned"
REJECTED_UNUSABLE = "the rejected answer of a pair cannot be used"
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def has_pair(record: Mapping[str, Any]) -> bool:
    """Whether the record holds two answers of which one is better."""
    return record.get("chosen") is not None and record.get("rejected") is not None


def check_sides(record: Mapping[str, Any]) -> None:
    """Raise UnusableRecord for a record that has one answer of a pair and not the other."""
    given = [key for key in ("chosen", "rejected") if record.get(key) is not None]
    if len(given) == 1:
        missing = "rejected" if given == ["chosen"] else "chosen"
        raise UnusableRecord(f'"{given[0]}" of a preference pair is there, but "{missing}" is missing')


def both_sides(
    record: Mapping[str, Any], answers: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record with the chosen answer, and with the rejected one; `answers`: the keys of answers by question.

    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
        -> {"prompt": "Hi", "response": "Hello"}, {"prompt": "Hi", "response": "Go"}
    Raises UnusableRecord for a pair without a question.
    """
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
    better, worse = (_side(rest, record[key], key, answers) for key in ("chosen", "rejected"))
    return better, worse


def chosen_side(record: dict[str, Any], answers: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The record with the chosen answer; one without a pair, or with an answer beside it, as it is.

    Raises UnusableRecord as `both_sides` does.
    """
    has_answer = any(record.get(key) is not None for question in answers for key in answers[question])
    for turns in map(record.get, TURN_LISTS):
        has_answer |= isinstance(turns, (list, tuple)) and bool(turns) and role_of(turns[-1]) == "assistant"
    return both_sides(record, answers)[0] if has_pair(record) and not has_answer else record


def _side(rest: dict[str, Any], answer: Any, key: str, answers: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    turns_key = next((name for name in TURN_LISTS if isinstance(rest.get(name), (list, tuple))), None)
    if turns_key is not None:
        return {**rest, turns_key: [*rest[turns_key], *_messages(answer)]}
    prompt = rest.get("prompt")
    if isinstance(answer, (list, tuple)) and answer and isinstance(answer[0], dict):
        return {**_without(rest, "prompt"), "messages": [*_asked(prompt, answer), *answer]}
    if isinstance(prompt, (list, tuple)):
        return {**_without(rest, "prompt"), "messages": [*prompt, *_messages(answer)]}
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    question = next((name for name in answers if rest.get(name) is not None), None)
    if question is not None:
        return {**rest, answers[question][0]: answer}
    if isinstance(answer, str) and len(spoken := _SPEAKER.split(answer)) > 1 and not spoken[0].strip():
        return {**rest, "messages": _dialogue(spoken)}
    raise UnusableRecord(f'"{key}" is {kind_of(answer)}, and no question stands beside it: "prompt" or "messages"')


def _asked(prompt: Any, answer: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The messages in front of `answer`: none where it is a whole conversation."""
    if isinstance(prompt, (list, tuple)):
        return list(prompt)
    is_whole = len(answer) > 1 or answer[0].get("role", answer[0].get("from")) in ("user", "human", "system")
    return [] if is_whole or prompt is None else [{"role": "user", "content": prompt}]


def _messages(answer: Any) -> list[Any]:
    if isinstance(answer, (list, tuple)):
        return list(answer)
    return [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


def _dialogue(spoken: list[str]) -> list[dict[str, str]]:
    """["", "Human", " Hi", "Assistant", " Hello"] -> [user "Hi", assistant "Hello"]."""
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(spoken[1::2], spoken[2::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in pairs]


def _without(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}
