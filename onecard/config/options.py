"""The options of a config class: what `parsing.py` reads, by name, whichever group holds it."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Option:
    """One setting: its name, the group of the config that holds it ('' for the config itself), type and default."""

    name: str
    group: str
    type: Any
    default: Any
    bare: str | None  # the value that the flag means when none is typed after it
    advice: tuple[str, str]  # values that are not taken (a regular expression), and what to do for them
    takes_several: bool  # names with commas between them; spaces and a list are taken, too
    takes_any_text: bool  # of these: each may hold brackets and quotes, such as a pattern or a path

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def is_text(self) -> bool:
        return (
            self.type is str or self.takes_paths or (type(None) in get_args(self.type) and str in get_args(self.type))
        )

    @property
    def takes_paths(self) -> bool:
        """Whether more than one word may follow the flag, and the flag be given again; one word stays a text."""
        return {str, list[str]} <= set(get_args(self.type))

    @property
    def is_text_list(self) -> bool:
        """Whether each time the flag is given adds a text."""
        return self.type == list[str]


def as_typed(value: Any) -> str:
    """A value as it is typed: True -> true."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_of(config_class: type) -> dict[str, Option]:
    """Every option of a config class by name, in order of declaration; groups are flattened."""
    found: dict[str, Option] = {}
    holders = [("", config_class())]
    holders += [(f.name, getattr(holders[0][1], f.name)) for f in fields(config_class)]
    for group, holder in holders:
        if not is_dataclass(holder):
            continue
        types = get_type_hints(type(holder))
        for item in fields(holder):
            value = getattr(holder, item.name)
            if is_dataclass(value):
                continue
            bare = "true" if types[item.name] is bool else item.metadata.get("bare")
            several = item.metadata.get("several")
            advice = item.metadata.get("advice", ("", ""))
            found[item.name] = Option(
                item.name, group, types[item.name], value, bare, advice, bool(several), several == "texts"
            )
    return found
