"""Several runs in a row from one file: which options each stage has, all of them checked before the first begins.

A stages file is YAML: `stages`, a list whose items have a `name` and any options of finetune; what stands beside the
list holds for every stage. defaults < the file's common options < those of the stage < flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onecard.config.options import Option, options_of
from onecard.config.parsing import CONFIG_FLAG, PRINT_FLAG, parse, to_yaml, unknown_option, yaml_content
from onecard.config.training import FinetuneConfig
from onecard.console import say
from onecard.errors import ConfigError

STAGES_FLAG, NAME, LIST = "stages", "name", "stages"
# Of the chain, not of one stage.
OF_THE_CHAIN = ("model_path", "output_path", "init_adapter", "lora_remote_checkpoint", "trust_remote_code")
# What a chain does by itself (it goes on where it was cut off).
NOT_IN_A_CHAIN = ("resume_from_checkpoint", "from_data_beginning")
OF_ONE_STAGE = ("finish_by", "max_hours")  # the first stage would take all of the time


@dataclass(frozen=True)
class Stage:
    """One run of a chain, with its options as they were given."""

    number: int
    """Counted from 1."""
    name: str
    config: FinetuneConfig

    @property
    def directory(self) -> Path:
        """Where its run lies: a numbered folder in --output_path."""
        return Path(self.config.train.output_path) / f"{self.number}-{self.name}"


def parse_stages(words: Sequence[str], *, description: str, defaults: Mapping[str, Any]) -> list[Stage]:
    """The stages of the file that `--stages` names; empty without that flag.

    Raises ConfigError with every bad setting by file, stage and key; SystemExit after --print_config.
    """
    file, rest = _without(list(words))
    if file is None or any(word in ("-h", "--help") for word in rest):
        return []
    if any(word.split("=")[0] == f"--{CONFIG_FLAG}" for word in rest):
        raise ConfigError("--config", f"does not go with --stages: put its lines beside the list of stages in {file}")
    typed = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
    for name in (*NOT_IN_A_CHAIN, *OF_ONE_STAGE):
        if name in typed:
            raise ConfigError(f"--{name}", _why_not(name))
    common, listed = _read(Path(file))
    words_of_a_run = [word for word in rest if word != f"--{PRINT_FLAG}"]
    stages: list[Stage] = []
    wrong: dict[str, list[str]] = {}
    for number, own in enumerate(listed, 1):
        name = own.pop(NAME)
        layered = {key: value for key, value in {**common, **own}.items() if key not in typed}
        try:
            config = parse(FinetuneConfig, words_of_a_run, description=description, defaults=defaults,
                           stored=partial(_as_stored, layered))  # fmt: skip
        except ConfigError as reason:
            wrong.setdefault(str(reason), []).append(name)
        else:
            stages.append(Stage(number, name, config))
    if wrong:
        raise ConfigError("", "\n".join(_of_stages(file, names, len(listed), text) for text, names in wrong.items()))
    if len(rest) != len(words_of_a_run):
        for stage in stages:
            say(f"# stage {stage.number}: {stage.name}\n{to_yaml(stage.config).rstrip()}\n---")
        raise SystemExit(0)
    return stages


def _as_stored(options: Mapping[str, Any], _typed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a stage as `parse` takes them: between defaults and flags."""
    return options


def _of_stages(file: str, names: list[str], n_stages: int, text: str) -> str:
    """A problem with its place: the file, and the stages that have it."""
    which = f"all {n_stages} stages" if len(names) == n_stages > 1 else f"stage {', '.join(names)}"
    return f"{file}: {which}: {text}"


def _without(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --stages and the other words. Raises ConfigError where it has none."""
    flag = f"--{STAGES_FLAG}"
    for place, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name != flag:
            continue
        if has_value:
            return value, words[:place] + words[place + 1 :]
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            raise ConfigError(flag, "needs a value: the YAML file with the list of stages")
        return words[place + 1], words[:place] + words[place + 2 :]
    return None, words


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Common options, and those of each stage with its name. Raises ConfigError for all that is no stages file."""
    flag = f"--{STAGES_FLAG}"
    content = yaml_content(path, flag)
    common = dict(content) if isinstance(content, dict) else {}
    listed = common.pop(LIST, None) if common else content
    if not isinstance(listed, list) or not listed or not all(isinstance(own, dict) for own in listed):
        raise ConfigError(flag, f"{path} must hold `{LIST}:` and under it a list of stages, each with `- {NAME}: NAME` "
                          "and its options")  # fmt: skip
    options = options_of(FinetuneConfig)
    problems = [f"{path}: {key}: {text}" for key, text in _wrong_keys(common, options, OF_ONE_STAGE)]
    seen: list[str] = []
    for number, own in enumerate(listed, 1):
        name = own.get(NAME)
        where = f"{path}: stage {number if name is None else name}: "
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            problems.append(f"{where}{NAME}: {name!r} is no name; use letters, digits, - and _ (it names a folder)")
        elif name in seen:
            problems.append(f"{where}{NAME}: there are two stages of this name")
        seen.append(str(name))
        own_options = {key: value for key, value in own.items() if key != NAME}
        problems += [f"{where}{key}: {text}" for key, text in _wrong_keys(own_options, options, OF_THE_CHAIN)]
    if problems:
        raise ConfigError("", "\n".join(problems))
    return common, [dict(own) for own in listed]


def _wrong_keys(
    given: Mapping[Any, Any], options: Mapping[str, Option], elsewhere: Sequence[str]
) -> list[tuple[str, str]]:
    """The keys that are no option, or not one for this place, each with what is said of it."""
    found = []
    for key in map(str, given):
        if key not in options:
            found.append((key, unknown_option(key, options)))
        elif key in (*elsewhere, *NOT_IN_A_CHAIN, STAGES_FLAG):
            found.append((key, _why_not(key)))
    return found


def _why_not(name: str) -> str:
    if name in OF_ONE_STAGE:
        return "say for which stage: all of them would end by it, and the first would take all of the time"
    if name in OF_THE_CHAIN:
        return "is of all stages: put it beside the list of stages, or on the command line"
    return "does not go with --stages: a chain goes on by itself where it was cut off, with the same command"
