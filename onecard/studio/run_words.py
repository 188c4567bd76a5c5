"""Options from the page to the words of `onecard finetune`: all problems by flag, and no path outside the roots."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from onecard.config.data import data_portions
from onecard.config.given_paths import CHECKS, paths_in, shipped_file
from onecard.config.options import Option, as_typed, options_of
from onecard.config.parsing import help_texts, parse, unknown_option
from onecard.config.problems import Problem, refuse
from onecard.config.rollouts import reward_specs
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.installation import command
from onecard.serve.http_error import ApiError
from onecard.studio.context import StudioContext
from onecard.translation import language

# What a page may not set: these run code of others, or name a place that the studio chooses.
REFUSED = {
    "trust_remote_code": "lets a model's own code run; start such a run in a terminal",
    "reward_file": "runs a Python file; start such a run in a terminal",
    "stages": "has runs of its own; start it in a terminal",
    "deepspeed": "is for several processes; start such a run in a terminal",
    "output_path": "is chosen by the run's name",
    "cache_path": "is chosen by the studio",
}
_PARSING = threading.Lock()
READ = (*(name for name in CHECKS if name not in REFUSED), "data", "eval_suites")


def checked_words(context: StudioContext, options: Mapping[str, Any], output: Path) -> list[str]:
    """The words of a run with these options (name -> value). Raises ConfigError with every problem by its flag."""
    known = options_of(FinetuneConfig)
    problems: list[Problem] = []
    words = [f"--output_path={output}"]
    for name, value in options.items():
        if value is None or value == "":
            continue
        if name in REFUSED or name not in known:
            problems.append((f"--{name}", REFUSED.get(name) or unknown_option(str(name)[:100], known)))
            continue
        try:
            words += _words_of(context, known[name], value, options)
        except ConfigError as reason:
            problems.extend(reason.problems)
    try:
        # Python 3.11 cannot read source code in two threads at once: https://github.com/python/cpython/issues/106905
        with _PARSING:
            parse(FinetuneConfig, [*words, f"--language={language()}"])
    except ConfigError as reason:
        problems.extend(reason.problems)
    refuse(problems)
    return words


def command_line(words: Iterable[str]) -> str:
    """What to type for the same."""
    return f"{command('finetune')} {shlex.join(words)}"


@cache
def option_help() -> list[dict[str, Any]]:
    """Every option of a run: name, group, kind, choices, default, and the text of --help."""
    config = FinetuneConfig()
    kinds: set[type] = {type(group) for group in vars(config).values()}
    texts = {kind: help_texts(kind) for kind in kinds}
    found = []
    for name, option in options_of(FinetuneConfig).items():
        if name in REFUSED:
            continue
        holder = type(getattr(config, option.group))
        choices = [] if option.is_text or option.takes_paths else _choices(option.type)
        kind = "choice" if choices else {bool: "flag", int: "whole", float: "number"}.get(option.type, "text")
        found.append({"name": name, "group": option.group, "kind": kind, "choices": choices,
                      "default": option.default, "help": texts[holder].get(name, "")})  # fmt: skip
    return found


def _choices(kind: Any) -> list[str]:
    return [as_typed(choice) for choice in get_args(kind) if not isinstance(choice, type) and not get_args(choice)]


def _words_of(context: StudioContext, option: Option, value: Any, options: Mapping[str, Any]) -> list[str]:
    """One `--name=value` for each value, so that no value is ever taken for a flag."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float, bool)) for one in values) or len(values) > 100:
        raise ConfigError(option.flag, "is neither a text nor a number, nor a list of them")
    texts = [as_typed(one) for one in values]
    if any("\0" in text or len(text) > 10_000 for text in texts):
        raise ConfigError(option.flag, "is too long, or holds what no option holds")
    if option.name == "data":
        texts = [_portion(context, text, options) for text in texts]
    elif option.name in READ:
        is_list = option.takes_paths or option.name == "eval_suites"
        texts = [_readable(context, option.flag, text, may_be_list=is_list) for text in texts]
    elif option.name == "reward":
        _check_reward(context, texts)
    return [f"--{option.name}={text}" for text in texts]


def _readable(context: StudioContext, flag: str, text: str, *, may_be_list: bool = False) -> str:
    """A file or folder as an absolute path within the roots; names and ids of the Hub as they are."""
    if may_be_list and (parts := paths_in(text)) != [text]:
        return ",".join(_readable(context, flag, part) for part in parts)
    text = shipped_file(text)
    try:
        path = Path(text).expanduser()
        if path.is_absolute() or path.exists() or ".." in path.parts:
            return str(context.safe_path(str(path.absolute()), context.readable))
        found = context.safe_path(text, context.readable)
        return str(found) if found.exists() else text
    except ApiError as reason:
        raise ConfigError(flag, reason.message) from None
    except (OSError, RuntimeError, ValueError):
        raise ConfigError(flag, "this is no path") from None


def _portion(context: StudioContext, text: str, options: Mapping[str, Any]) -> str:
    """The parts of --data, each a name in the folder --data_path, a path or an id, with its share."""
    folder = options.get("data_path")
    parts = []
    for portion in data_portions(text):
        inside = context.safe_path(folder, context.readable) if isinstance(folder, str) and folder else None
        is_named = inside is not None and inside.is_dir() and Path(portion.name).name == portion.name
        name = portion.name if is_named else _readable(context, "--data", portion.name)
        parts.append(f"{name}{portion.suffix}")
    return ",".join(parts)


def _check_reward(context: StudioContext, texts: list[str]) -> None:
    for text in texts:
        try:
            specs = reward_specs(text)
        except ValueError:  # `parse` says what is wrong
            continue
        for spec in specs:
            if spec.name == "json_schema" and spec.argument:
                _readable(context, "--reward", spec.argument)
