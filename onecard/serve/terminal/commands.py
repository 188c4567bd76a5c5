"""The commands of a chat in the terminal, as words: which there are, how they are typed, what their values mean.

Knows names and texts. It does not know sessions, engines or the screen, nor what a command does (chat.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from onecard.config.inference import SamplingOptions
from onecard.console import nearest
from onecard.errors import DataError


class Command(NamedTuple):
    """A command's name, what follows it, and what it does."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("help", "", "this list"),
    Command("regenerate", "", "another answer to the last question (also /r)"),
    Command("undo", "", "take the last question and its answer back"),
    Command("edit", "N TEXT", "change message N and drop what is behind it; a question is asked again"),
    Command("clear", "", "forget the conversation; the system prompt stays"),
    Command("system", "TEXT", 'set the system prompt ("" for none), or show it'),
    Command("history", "", "show the conversation with the numbers of its messages"),
    Command("save", "FILE", "save the chat as JSON"),
    Command("save!", "FILE", "save it in the place of another file"),
    Command("load", "FILE", "go on with a saved chat"),
    Command("set", "NAME VALUE", "change a parameter, such as /set temperature 0.7"),
    Command("reset", "", "set all parameters back"),
    Command("show", "", "show parameters, adapter and template"),
    Command("adapter", "NAME", "answer with another adapter, or list them"),
    Command("documents", "on|off", "answer out of the documents of --documents"),
    Command("prompt_type", "NAME", "use another prompt template; auto: the adapter's own"),
    Command("beams", "on|off", "show all beams while they compete (with num_beams above 1)"),
    Command("exit", "", "leave (also Ctrl-D)"),
)
NAMES = tuple(command.name for command in COMMANDS)
ALIASES = {"r": "regenerate", "h": "help", "?": "help", "quit": "exit", "q": "exit"}
INPUT_HELP = (
    'A line that ends in \\ goes on in the next one; """ begins and ends a text of several lines.\n'
    "A space in front of / sends the line as it is."
)
_COMMAND = re.compile(r"/([A-Za-z_]+!?|\?)(?:\s+(.*))?", re.DOTALL)


def split_command(message: str) -> tuple[str, str] | None:
    """(name, what follows) of a command, known or not; None for a message to the model.

    "/r" -> ("regenerate", ""); "/edit 3 Why?" -> ("edit", "3 Why?"); "/usr/bin is full" -> None
    """
    match = _COMMAND.fullmatch(message)
    if match is None:
        return None
    name = match[1].lower()
    return ALIASES.get(name, name), match[2] or ""


def check_command(name: str) -> None:
    """Raise DataError with the nearest name when there is no such command."""
    if name not in NAMES:
        hint = nearest(name, [*NAMES, *ALIASES]).replace("mean ", "mean /")
        raise DataError(
            f"there is no command /{name}{hint}; /help lists them, and a space in front of / sends a line as it is"
        )


def help_text() -> str:
    """The commands, one a line, and how several lines are typed."""
    width = max(len(command.name) + len(command.argument) for command in COMMANDS) + 3
    lines = [f"  {f'/{command.name} {command.argument}':<{width}} {command.help}" for command in COMMANDS]
    return "\n".join([*lines, INPUT_HELP])


def parameter_value(name: str, text: str) -> Any:
    """A parameter's value from what was typed. Raises DataError for an unknown name or a value that does not fit.

    ("top_k", "5") -> 5; ("stop", "###") -> ["###"]; ("stop", '["a", "b\\n"]') -> ["a", "b\n"]; ("stop", "") -> []
    """
    known: Sequence[str] = [option.name for option in fields(SamplingOptions)]
    if name not in known:
        raise DataError(f"there is no parameter {name}{nearest(name, known)}; /show lists them")
    default = getattr(SamplingOptions(), name)
    if isinstance(default, list):
        return _texts(text)
    kind, words = (float, "a number") if isinstance(default, float) else (int, "a whole number")
    try:
        return kind(text)
    except ValueError:
        raise DataError(f"{name} takes {words}, and {text[:40] or 'nothing'} is none") from None


def _texts(text: str) -> list[str]:
    """The texts of a JSON list, or the text itself."""
    try:
        values = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    return [text] if text else []
