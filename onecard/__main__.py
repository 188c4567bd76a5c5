"""The program `onecard`: its first word names a module of onecard/programs, which reads the words after it.

A hyphen in a verb is an underscore in the module's name; the first sentence of the module's docstring, up to a colon,
is the verb's line in --help.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from onecard import __version__
from onecard.console import nearest, run_main, say
from onecard.errors import ConfigError
from onecard.installation import SCRIPTS, program_name, verbs
from onecard.translation import typed_language, use_language


def overview() -> str:
    """What `onecard --help` prints: every verb with a line."""
    name = program_name() or "onecard"
    lines = [f"  {verb:<15}{_summary(file)}" for verb, file in verbs().items()]
    usage = [f"usage: {name} VERB [--OPTION VALUE ...]", f"       {name} VERB --help"]
    return "\n".join([*usage, "", "Verbs:", *lines])


def _summary(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:]\s", f"{' '.join(text.split())} ")[0]


def run(words: Sequence[str]) -> None:
    """Start the program that the first word names. Raises ConfigError for an unknown one."""
    use_language(typed_language(words))
    typed = words[0] if words else "--help"
    verb = typed.replace("_", "-")
    if verb in verbs():
        import_module(f"onecard.programs.{verb.replace('-', '_')}").main(list(words[1:]))
    elif "--version" in words:
        say(f"onecard {__version__}")
    elif typed.startswith("-"):
        if not {"-h", "--help"} & {typed, *words}:
            raise ConfigError("", f"{typed} stands before the verb; say first what to do, such as: finetune {typed}")
        say(overview())
    else:
        of_scripts = {Path(script).stem.replace("_", "-"): known for known, script in SCRIPTS.items()}
        meant = nearest(of_scripts.get(Path(verb).stem, verb), list(verbs()))
        raise ConfigError("", f"{typed!r} is no verb of onecard{meant}; onecard --help lists them")


def main() -> int:
    """The console program. Returns the exit code."""
    return run_main(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
