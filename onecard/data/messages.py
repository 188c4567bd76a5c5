"""The two things a data file can hold: a conversation to answer, or a document to continue.

Knows roles and turns. Does not know files, templates, tokenizers or token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool", "tool_list"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function: `arguments` is a JSON object as text; `id` is "" where the data give none."""

    name: str
    arguments: str = "{}"
    id: str = ""

    def message(self) -> dict[str, Any]:
        """The call as chat templates take it, its arguments as an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {**({"id": self.id} if self.id else {}), "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `input` is the second field of an alpaca record; only user turns have one.

    `learn` is False for an answer that the data mark as not to be learned: it is read, and nothing is learned from it.
    `weight` scales the loss of an answer. `thought` is what an answer's author thought, where the data keep it apart.
    `tool_calls` are made by answers; a turn of the role tool is the result of the one called `call_id`.
    The role tool_list is no message: its content is the JSON list of the tools that may be called. It stands behind
    the system turn, if there is one.
    `name` is who speaks, where an API client says so; templates of checkpoints may read it.
    """

    role: Role
    content: str
    input: str = ""
    learn: bool = True
    name: str = ""
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    weight: float = 1.0

    def one_text(self, between: str = "\n") -> str:
        """The content with the input below it, for what knows no inputs."""
        return between.join(filter(None, (self.content, self.input)))

    def all_texts(self) -> list[str]:
        """All that a template may write of it, out of the arguments of its calls, too."""
        calls = [text for call in self.tool_calls for text in (call.name, *_strings_of(json.loads(call.arguments)))]
        return [self.content, self.input, self.thought, *calls]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order: optional system and tool_list turns, then questions, answers, and results of tools.

    `record` is how a person finds it again, e.g. "chat.jsonl:12".
    `rejected`: the turns of the worse answer of a preference pair, from the first one on; `turns` are the better one's.
    `margin`: by how much the better answer is better, where the data say so (for a reward model).
    `label`: whether the answer is a good one, where the data say so (as for KTO).
    """

    turns: tuple[Turn, ...]
    record: str
    rejected: tuple[Turn, ...] = ()
    label: bool | None = None
    margin: float = 0.0

    def messages(self) -> list[dict[str, Any]]:
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


def turns_to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Hugging Face messages of these turns; keys besides role and content only where they are not empty."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "tool_list":
            continue
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        more = {
            "input": turn.input, "name": turn.name, "reasoning_content": turn.thought, "tool_call_id": turn.call_id,
            "tool_calls": [call.message() for call in turn.tool_calls],
        }  # fmt: skip
        messages.append(message | {key: value for key, value in more.items() if value})
    return messages


def tools_of(turns: Sequence[Turn]) -> list[dict[str, Any]] | None:
    """The tools that may be called, as chat templates take them; None where there are none."""
    return next((json.loads(turn.content) for turn in turns if turn.role == "tool_list"), None)


def _strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings_of(item)
