"""Run the project's own checks, in a clone: ruff, mypy, import-linter and the tests.

It makes .venv with requirements-dev.txt first, again only when a requirements file changes. No card and no network are
needed, apart from the install.
  (nothing)      everything but the tests marked slow
  --all          the slow ones too
  --gptq         only the tests of GPTQ, which run in .venv-gptq
  --trl          only the comparison of losses with TRL's, which runs in .venv-trl
  --real         only the tests on real small models (330 MB, installed into .venv)
Other words go to pytest, such as tests/data -x. Environment variable TEST_PROCESSES: how many run at once (2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from onecard.console import say
from onecard.errors import ConfigError
from onecard.installation import IS_CLONE, SHIPPED, program_name
from onecard.programs._environment import FOR_TESTS, VENV, call, prepare_layer, prepare_venv, script_of

NOTHING_COLLECTED = 5  # pytest's exit code
LAYERS = {"gptq": "GPTQ", "trl": "TRL"}
"""Marks of tests that have an environment of their own, and what is said of them."""
SIMULATED = "sm75:11GiB,sm75:11GiB,late,garbage"


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line. Raises SystemExit when a check fails."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        usage = "test [--all | --gptq | --trl | --real] [WORDS OF PYTEST]"
        say(f"usage: {program_name() or 'onecard'} {usage}\n\n{__doc__}")
        raise SystemExit(0)
    if not IS_CLONE:
        raise ConfigError("", "the tests are not installed with the program: run this in a clone of the repository")
    layers = [mark for mark in LAYERS if f"--{mark}" in words]
    own = {"--all", "--real", *(f"--{mark}" for mark in LAYERS)}
    slow = "(slow or not slow)" if "--all" in words else "not slow"
    others = [word for word in words if word not in own]
    python = prepare_venv(*FOR_TESTS)
    if "--real" in words:
        _real(python, others)
        return
    if not layers:
        _lint(python)
        _most(python, slow, others)
    for mark in layers or ([] if others else LAYERS):
        layer = prepare_layer(mark)
        say(f"== pytest, {LAYERS[mark]}")
        # Collecting all the others takes longer than these tests do.
        _tests(layer, f"{slow} and {mark}", others, *([] if others else _marked(mark)))
    say("== all checks passed")


def _tests(python: Path, marks: str, words: Sequence[str], *places: str, is_spread: bool = False) -> None:
    """Run pytest on tests of these marks. That the typed words leave none of them is no fault.

    Raises SystemExit with pytest's exit code.
    """
    # Processes share the cores better than torch's own threads do on models this small.
    spread = ["-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadfile"] if is_spread else []
    pytest = [str(python), "-m", "pytest", "-q", "--durations=10", "-m", marks, *spread, *places, *words]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    code = call(pytest, OMP_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false", PYTHONUTF8="1")
    if code and not (code == NOTHING_COLLECTED and words):
        raise SystemExit(code)


def _lint(python: Path) -> None:
    for title, *commands in (
        ("ruff", ("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", ".")),
        ("mypy", ("-m", "mypy")),
    ):
        say(f"== {title}")
        for command in commands:
            _checked(python, *command)
    say("== import-linter")
    _checked(script_of(VENV, "lint-imports"), "--no-logo", "--no-cache")


def _most(python: Path, slow: str, words: Sequence[str]) -> None:
    """All tests but those of layers and of real models; those of cards once more in processes with a simulated card."""
    say("== pytest")
    _tests(python, f"{slow} and not gptq and not trl and not real", words, is_spread=True)
    if not words or any(word.startswith(("tests/gpu", "tests/simcard")) for word in words):
        say("== pytest, simulated card")
        places = () if words else ("tests/gpu", "tests/simcard")
        _tests(python, f"{slow} and (gpu or simcard)", words, "--simcard", SIMULATED, *places, is_spread=True)


def _real(python: Path, words: Sequence[str]) -> None:
    _checked(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "-r",
             "requirements-real.txt")  # fmt: skip
    say("== pytest, real models")
    _tests(python, "real", words, "tests/real")


def _marked(mark: str) -> list[str]:
    files = sorted((SHIPPED / "tests").rglob("test_*.py"))
    found = [file for file in files if f"mark.{mark}" in file.read_text(encoding="utf-8")]
    return [file.relative_to(SHIPPED).as_posix() for file in found]


def _checked(*command: str | Path) -> None:
    code = call(command)
    if code:
        raise SystemExit(code)
