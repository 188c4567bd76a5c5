"""From the command line and YAML to a config, with all that is wrong said at once.

Order: defaults < the options stored with a run < ``--config file.yaml`` < flags. argparse writes the help text and
jsonargparse checks the types; this module adds what they lack: every bad setting in one answer, each by its flag's
name, and the name that an unknown one has here. Nothing heavy is imported, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from onecard.config import old_names
from onecard.config.given_paths import impossible_paths, path_problems, shipped_file, with_homes, with_shipped_files
from onecard.config.options import Option, as_typed, options_of
from onecard.config.problems import Problem, problems_of, refuse
from onecard.config.training import FinetuneConfig
from onecard.console import nearest, say
from onecard.errors import ConfigError
from onecard.installation import program_name, with_commands
from onecard.translation import LANGUAGE_FLAG, LANGUAGES, typed_language, use_language

Config = TypeVar("Config")
CONFIG_FLAG, PRINT_FLAG, DEBUG_FLAG = "config", "print_config", "debug"
# What every program takes, and which values; `translation.typed_language` and `console.run_main` look at the words.
GENERAL = {LANGUAGE_FLAG: LANGUAGES, DEBUG_FLAG: ("", "true", "false")}
VALUE = "value"  # what a parser of one type calls the value that it checks
LANGUAGE_HELP = "Language of the messages; auto: that of the system."


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    stored: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    verb: str = "",
    opens_files: bool = True,
) -> Config:
    """Turn a command line into a checked config.

    Args:
        config_class: a dataclass of scalar fields, or of groups that are such dataclasses.
        argv: words after the program's name; `None` reads `sys.argv`.
        description: first lines of the help text; lines that begin with `onecard` stay lines of their own.
        defaults: values that this program starts from instead of the class's own.
        stored: given the settings typed so far, the options that an earlier run stored; they win over defaults only.
        verb: the word before the options, for the help text; `parse_verb` has read it already.
        opens_files: whether what the options name must be there; False for a program that only plans.

    Raises:
        ConfigError: with every unknown name, wrong type, contradiction and missing file found, not only the first.
        SystemExit: with 0, after ``--help`` and ``--print_config``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    use_language(typed_language(words))
    options = options_of(config_class)
    if any(word in ("-h", "--help") for word in words):
        _help_parser(config_class, options, description, dict(defaults or {}), verb).print_help()
        raise SystemExit(0)

    problems: list[Problem] = []
    typed, yaml_files = _read_words(words, options, problems)
    values = {name: option.default for name, option in options.items()} | dict(defaults or {})
    from_files: dict[str, Any] = {}
    for file in yaml_files:
        from_files |= _read_yaml(Path(shipped_file(file)), options, problems)
    flags = _checked(typed, options, problems)
    if impossible := impossible_paths({**from_files, **flags}):  # before anybody looks at them
        refuse(problems + impossible)
    from_files, flags = with_homes(from_files), with_homes(flags)
    if stored is not None:
        values |= _checked(stored({**from_files, **flags}), options, problems)
    values |= _checked(from_files, options, problems)
    values = with_shipped_files(values | flags)
    config = _build(config_class, options, values)
    problems += problems_of(config)
    only_print = any(word == f"--{PRINT_FLAG}" for word in words)
    refuse(problems if only_print or not opens_files else problems + path_problems(values))
    if only_print:
        say(to_yaml(config).rstrip())
        raise SystemExit(0)
    return config


def parse_verb(
    verbs: Mapping[str, type[Any]], argv: Sequence[str] | None = None, *, description: str = "", above: str = ""
) -> tuple[str, Any]:
    """The verb that stands first on a command line (`onecard weight-diff make ...`), and its checked config.

    Args:
        verbs: the config class of each verb; the first line of its docstring is the verb's help.
        above: the verb that these are verbs of, for the help text.

    Raises as `parse` does, and ConfigError for a missing or unknown verb.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    if verb in verbs:
        about = (verbs[verb].__doc__ or "").split("\n")[0]
        text, words_before = f"{verb}: {about}\n\n{description}".strip(), f"{above} {verb}".strip()
        return verb, parse(verbs[verb], words[1:], description=text, verb=words_before)
    if any(word in ("-h", "--help") for word in words):
        width = max(10, *map(len, verbs))
        lines = [f"  {name:<{width}} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in verbs.items()]
        say("\n".join([_wrapped(description), "", "Verbs, each with its own --help:", *lines]).strip())
        raise SystemExit(0)
    listed = ", ".join(verbs)
    if not verb or verb.startswith("--"):
        raise ConfigError("", f"say first what to do: {listed}")
    raise ConfigError("", f"{verb!r} is none of {listed}{nearest(verb, list(verbs))}")


def words_by_name(argv: Sequence[str] | None, *names: str) -> list[str]:
    """The words of a command line with those in front of all options under these names.

    `handover vllm RUN` is `handover --engine vllm --run RUN`; what stands behind the last name's word stays as it is.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    plain = list(takewhile(lambda word: not word.startswith("-"), words))[: len(names)]
    return [part for pair in zip(names, plain, strict=False) for part in pair] + words[len(plain) :]


def missing(options: object, *names: str) -> list[Problem]:
    """The problems of settings that have no default and were not given."""
    return [(f"--{name}", "is missing") for name in names if not getattr(options, name)]


def comma_list(text: str) -> list[str]:
    """The parts of a text with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def to_yaml(config: object) -> str:
    """The config as flat YAML that ``--config`` reads back."""
    values: dict[str, Any] = {}
    for name, option in options_of(type(config)).items():
        holder = getattr(config, option.group) if option.group else config
        values[name] = getattr(holder, name)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _help_parser(
    config_class: type, options: Mapping[str, Option], description: str, defaults: dict[str, Any], verb: str
) -> argparse.ArgumentParser:
    """A parser whose help groups options as the config does; it is never given words to read."""
    parser = argparse.ArgumentParser(
        prog=" ".join([program_name(), *sys.argv[1:2]]) if program_name() else None,
        description=_wrapped(description or (config_class.__doc__ or "").split("\n")[0]),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # leaves the description as `_wrapped` made it
        usage=f"%(prog)s {verb} [--config FILE.yaml] [--OPTION VALUE ...]".replace("  ", " "),
    )
    parser.add_argument(f"--{CONFIG_FLAG}", metavar="FILE", help="YAML file of options; flags win over it.")
    parser.add_argument(f"--{PRINT_FLAG}", action="store_true", help="Print the resolved options as YAML and exit.")
    if LANGUAGE_FLAG not in options:
        parser.add_argument(f"--{LANGUAGE_FLAG}", choices=LANGUAGES, help=f"{LANGUAGE_HELP} (default: auto)")
    if DEBUG_FLAG not in options:
        parser.add_argument(f"--{DEBUG_FLAG}", action="store_true", help="Show tracebacks.")
    given = {name: option.default for name, option in options.items()} | defaults
    for holder, group in _holders(config_class, options):
        section = parser.add_argument_group((holder.__doc__ or "").split("\n")[0].rstrip("."))
        for name, text in help_texts(holder).items():
            if name in options and options[name].group == group:
                metavar, kind = _shown_type(options[name].type)
                default = "null" if given[name] is None else given[name]
                about = f"{with_commands(text)} ({kind}default: {default})".replace("%", "%%")
                section.add_argument(f"--{name}", metavar=metavar, help=about)
    return parser


def _shown_type(kind: Any) -> tuple[str | None, str]:
    """What stands after a flag in the help, `{4,8,16,32}` (None: the flag's own name), and `type: int, `."""
    if kind is bool:
        return "{true,false}", ""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(as_typed, get_args(kind))) + "}", ""
    name = kind.__name__ if type(kind) is type else str(kind).replace("typing.", "").replace("None", "null")
    return None, f"type: {name}, "


def _holders(config_class: type, options: Mapping[str, Option]) -> list[tuple[type, str]]:
    """The classes that hold options, each with the name of its group ('' for the config itself)."""
    example = config_class()
    found = [(config_class, "")] if any(not option.group for option in options.values()) else []
    values = [(f.name, getattr(example, f.name)) for f in fields(config_class)]
    return found + [(type(value), name) for name, value in values if is_dataclass(value)]


@cache
def help_texts(holder: type) -> dict[str, str]:
    """The text under each field of a dataclass, by the field's name, those of its bases last."""
    found: dict[str, str] = {}
    for kind in holder.__mro__[:-1]:
        lines = _classes_in(kind.__module__)[kind.__name__].body
        for line, after in zip(lines, [*lines[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = ast.literal_eval(after.value) if is_text else ""  # type: ignore[union-attr]
                found[line.target.id] = found.get(line.target.id) or str(text)
    return found


@cache
def _classes_in(module: str) -> dict[str, ast.ClassDef]:
    """The source of each class of a module; `inspect.getsource` reads a class in Python, ten times as slowly."""
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _wrapped(text: str) -> str:
    """Paragraphs in the width of the terminal; empty lines and lines of a command stay as they are."""
    width = shutil.get_terminal_size().columns - 2
    is_prose = re.compile(r"(?!python |onecard )\S")
    found: list[str] = []
    for prose, lines in groupby(with_commands(text).strip().splitlines(), lambda line: bool(is_prose.match(line))):
        block = list(lines)
        found += [textwrap.fill(" ".join(block), width)] if prose else block
    return "\n".join(found)


def _read_words(
    words: Sequence[str], options: Mapping[str, Option], problems: list[Problem]
) -> tuple[dict[str, Any], list[str]]:
    """Split the command line into settings by name (values still as typed) and YAML files."""
    typed: dict[str, Any] = {}
    paths: dict[str, list[str]] = {}
    yaml_files: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, has_value, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            problems.append((word, "is not an option; options start with -- and are listed by --help"))
            continue
        if name == PRINT_FLAG:
            continue
        has_more = position < len(words) and not words[position].startswith("--")
        if not has_value and has_more:
            value, has_value = words[position], "="
            position += 1
        if name in GENERAL and name not in options:
            if value not in GENERAL[name]:
                problems.append((f"--{name}", f"{value!r} is not one of {', '.join(filter(None, GENERAL[name]))}"))
        elif name != CONFIG_FLAG and name not in options:
            problems.append((f"--{name}", unknown_option(name, options)))
        elif not has_value and (name == CONFIG_FLAG or options[name].bare is None):
            problems.append((f"--{name}", "needs a value"))
        elif name == CONFIG_FLAG:
            yaml_files.append(value)
        elif options[name].is_text_list:
            typed[name] = [*typed.get(name, []), *_texts(value)]
        elif options[name].takes_several or options[name].takes_paths:
            more = list(takewhile(lambda word: not word.startswith("--"), words[position:]))
            position += len(more)
            paths[name] = [*paths.get(name, []), value, *more]
            several = paths[name] if len(paths[name]) > 1 else value
            joined = ",".join([value, *more])
            plain = joined if options[name].takes_any_text else _without_brackets(joined)
            typed[name] = several if options[name].takes_paths else plain
        else:
            typed[name] = value if has_value else options[name].bare
    return typed, yaml_files


def _without_brackets(text: str) -> str:
    """Names with commas between them, out of a list in the form of Python: ['q_proj', 'v_proj'] -> q_proj,v_proj."""
    return ",".join(comma_list(re.sub(r"[\[\]'\"]", "", text)))


def _texts(word: str) -> list[str]:
    """A word as a list of texts: a JSON list of strings is one; all else is one text, in which \\n is a new line."""
    try:
        listed = json.loads(word)
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(text, str) for text in listed):
        return listed
    return [word.replace("\\n", "\n")]


def yaml_content(path: Path, flag: str) -> Any:
    """What a YAML file holds. Raises ConfigError, which names the flag that named the file."""
    try:
        return yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError) as reason:  # the latter: the home of nobody who is known here
        raise ConfigError(flag, f"cannot read {path}: {getattr(reason, 'strerror', None) or reason}") from reason
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise ConfigError(flag, f"{path} is not YAML: {reason}") from reason


def _read_yaml(path: Path, options: Mapping[str, Option], problems: list[Problem]) -> dict[str, Any]:
    """The settings of one YAML file; unknown keys become problems."""
    content = yaml_content(path, f"--{CONFIG_FLAG}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--{CONFIG_FLAG}", f"{path} must hold `option: value` lines, not a {type(content).__name__}")
    unknown = [str(key) for key in content if key not in (*options, DEBUG_FLAG)]
    for key in unknown:
        problems.append((f"{path}: {key}", unknown_option(key, options)))
    return {key: value for key, value in content.items() if key in options}


@cache
def _parser_of(kind: Any) -> Any:
    """A parser of one value of this type: one of all options looks at each of them for each value."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument(f"--{VALUE}", type=kind, default=argparse.SUPPRESS)
    return parser


def _checked(raw: Mapping[str, Any], options: Mapping[str, Option], problems: list[Problem]) -> dict[str, Any]:
    """Values of the right type; each that is not becomes a problem."""
    good: dict[str, Any] = {}
    for name, value in raw.items():
        option = options[name]
        may_be_none = type(None) in get_args(option.type)
        if value is None and not may_be_none:  # `lora_r:` with nothing behind it in a file stands for the default
            continue
        if isinstance(value, bool) and "on" in get_args(option.type):  # YAML 1.1 reads on and off as true and false
            value = "on" if value else "off"
        if option.is_text and isinstance(value, str):
            # Taken as typed: an instruction such as "a: b" must not be read as YAML.
            good[name] = value
            continue
        if (
            (option.is_text_list or option.takes_paths)
            and isinstance(value, list)
            and all(isinstance(text, str) for text in value)
        ):
            good[name] = list(value)
            continue
        if option.takes_several and isinstance(value, list):
            good[name] = ",".join(str(part) for part in value)
            continue
        try:
            parser = _parser_of(option.type)
            words = [f"--{VALUE}={value}"] if isinstance(value, str) else None
            read = (parser.parse_args(words) if words else parser.parse_object({VALUE: value}))[VALUE]
            if read is None and not may_be_none:  # --lora_r null
                raise argparse.ArgumentError(None, "null")
            good[name] = read
        except argparse.ArgumentError:
            wrong, advice = option.advice
            more = f"; {advice}" if wrong and re.fullmatch(wrong, str(value), re.IGNORECASE) else ""
            problems.append((option.flag, f"{value!r} is not {_expected(option.type)}{more}"))
    return good


def _expected(kind: Any) -> str:
    """What a type asks for, in words: `one of 4, 8, 16, 32`, `a whole number`."""
    choices = [c for c in get_args(kind) if c is not type(None)]
    if choices and not isinstance(choices[0], type) and get_origin(kind) is not None:
        return "one of " + ", ".join(map(as_typed, choices))
    plain = choices[0] if choices else kind
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(plain, str(plain))


def unknown_option(name: str, options: Mapping[str, Option]) -> str:
    """What is said of a name that is no option: the one that is meant, where that can be told."""
    from onecard.config.inference import GenerateConfig

    name = name.replace("-", "_")
    others = {**options_of(FinetuneConfig), **options_of(GenerateConfig)}
    # Farther words are other words: batch_size is not test_size.
    meant = nearest(name, list(options), cutoff=0.75).replace("did you mean ", "did you mean --")
    return "no such option" + (with_commands(old_names.hint(name, options, others)) or meant)


def _build(config_class: type[Config], options: Mapping[str, Option], values: Mapping[str, Any]) -> Config:
    config = config_class()
    given: dict[str, dict[str, Any]] = {}
    for name, option in options.items():
        given.setdefault(option.group, {})[name] = values[name]
    own = given.pop("", {})
    groups = {group: replace(getattr(config, group), **held) for group, held in given.items()}
    return replace(config, **own, **groups)  # type: ignore[type-var]
