"""What is wrong with options: how it is said, collected and refused."""

from __future__ import annotations

from dataclasses import fields

from onecard.errors import ConfigError

Problem = tuple[str, str]  # (flag, what is wrong with it)


def problems_of(config: object) -> list[Problem]:
    """All contradictions between the groups of a config and within them, in the order of their declaration."""
    found: list[Problem] = list(config.problems()) if hasattr(config, "problems") else []
    for group in fields(config):  # type: ignore[arg-type]
        value = getattr(config, group.name)
        if hasattr(value, "problems"):
            found.extend(value.problems())
    return found


def too_small(options: object, **least: float) -> list[Problem]:
    """The problems of numbers, by the options' names, that are below the least that they may be, or none (NaN)."""
    return [
        (f"--{name}", f"{getattr(options, name)} is too little; use {bound} or more")
        for name, bound in least.items()
        if not getattr(options, name) >= bound
    ]


def refuse(problems: list[Problem]) -> None:
    """Raise one ConfigError that lists all `problems`; does nothing when there are none."""
    if len(problems) == 1:
        raise ConfigError(*problems[0])
    if problems:
        listed = "\n".join(f"  {flag}: {message}" for flag, message in problems)
        raise ConfigError("", f"{len(problems)} settings cannot work:\n{listed}", problems)
