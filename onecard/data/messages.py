"""The two things a data file can hold: a conversation to answer, or a document to continue.

Knows roles and turns. Does not know files, templates, tokenizers or token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `input` is the second field of an alpaca record; only user turns have one.

    `learn` is False for an answer that the data mark as not to be learned: it is read, and nothing is learned from it.
    `name` is who speaks, where an API client says so; templates of checkpoints may read it.
    """

    role: Role
    content: str
    input: str = ""
    learn: bool = True
    name: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order: an optional system turn, then user and assistant alternating.

    `record` is how a person finds it again, e.g. "chat.jsonl:12".
    """

    turns: tuple[Turn, ...]
    record: str

    def messages(self) -> list[dict[str, str]]:
        """Hugging Face messages for a Jinja chat template; the key "input" only where it is not empty.

        Conversation((Turn("user", "Translate", "cat"), Turn("assistant", "猫")), "a.json:1").messages()
        -> [{"role": "user", "content": "Translate", "input": "cat"}, {"role": "assistant", "content": "猫"}]
        """
        return turns_to_messages(self.turns)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to be learned whole, without roles."""

    text: str
    record: str


def turns_to_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Hugging Face messages of these turns; the keys "input" and "name" only where they are not empty."""
    messages = []
    for turn in turns:
        message = {"role": turn.role, "content": turn.content}
        if turn.input:
            message["input"] = turn.input
        if turn.name:
            message["name"] = turn.name
        messages.append(message)
    return messages
