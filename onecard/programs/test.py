"""Run the project's own checks, in a clone: ruff, mypy, import-linter and the tests.

It makes .venv with requirements-dev.txt first, again only when a requirements file changes. No card and no network are
needed, apart from the install.
  (nothing)      everything but the tests marked slow
  --all          the slow ones too
  --gptq         only the tests of GPTQ, which run in .venv-gptq
  --real         only the tests on real small models (330 MB, installed into .venv)
Other words go to pytest, such as tests/data -x. Environment variable TEST_PROCESSES: how many run at once (2).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from onecard.console import say
from onecard.errors import ConfigError
from onecard.installation import IS_CLONE, SHIPPED, program_name
from onecard.programs._environment import FOR_TESTS, VENV, call, prepare_gptq_venv, prepare_venv, script_of

NOTHING_COLLECTED = 5  # pytest's exit code
SIMULATED = "sm75:11GiB,sm75:11GiB,late,garbage"


@dataclass(frozen=True)
class Checks:
    """What is run: tests of which marks, in how many processes, and the words that go to pytest."""

    marks: str
    words: tuple[str, ...]

    def tests(self, python: Path, marks: str, *places: str, is_spread: bool = False) -> None:
        """Run pytest on tests of these marks. That the typed words leave none of them is no fault.

        Raises SystemExit with pytest's exit code.
        """
        # Processes share the cores better than torch's own threads do on models this small.
        spread = ["-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadfile"] if is_spread else []
        code = call([python, "-m", "pytest", "-q", "--durations=10", "-m", marks, *spread, *places, *self.words])
        if code and not (code == NOTHING_COLLECTED and self.words):
            raise SystemExit(code)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line. Raises SystemExit when a check fails."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        say(f"usage: {program_name() or 'onecard'} test [--all | --gptq | --real] [WORDS OF PYTEST]\n\n{__doc__}")
        raise SystemExit(0)
    if not IS_CLONE:
        raise ConfigError("", "the tests are not installed with the program: run this in a clone of the repository")
    own = {"--all", "--gptq", "--real"}
    slow = "(slow or not slow)" if "--all" in words else "not slow"
    checks = Checks(slow, tuple(word for word in words if word not in own))
    python = prepare_venv(*FOR_TESTS)
    for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("PYTHONUTF8", "1")):
        os.environ[name] = os.environ.get(name, value) if name == "OMP_NUM_THREADS" else value
    if "--real" in words:
        _real(python, checks)
        return
    if "--gptq" not in words:
        _lint(python)
        _most(python, checks)
    if "--gptq" in words or not checks.words:
        gptq = prepare_gptq_venv()
        say("== pytest, GPTQ")
        # Collecting all the others takes longer than these tests do.
        places = [] if checks.words else _marked_gptq()
        checks.tests(gptq, f"{slow} and gptq", *places)
    say("== all checks passed")


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


def _most(python: Path, checks: Checks) -> None:
    """All tests but those of GPTQ and of real models; those of cards once more in processes with a simulated card."""
    say("== pytest")
    checks.tests(python, f"{checks.marks} and not gptq and not real", is_spread=True)
    if not checks.words or any(word.startswith(("tests/gpu", "tests/simcard")) for word in checks.words):
        say("== pytest, simulated card")
        places = () if checks.words else ("tests/gpu", "tests/simcard")
        checks.tests(python, f"{checks.marks} and (gpu or simcard)", "--simcard", SIMULATED, *places, is_spread=True)


def _real(python: Path, checks: Checks) -> None:
    _checked(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "-r",
             "requirements-real.txt")  # fmt: skip
    say("== pytest, real models")
    checks.tests(python, "real", "tests/real")


def _marked_gptq() -> list[str]:
    files = sorted((SHIPPED / "tests").rglob("test_*.py"))
    found = [file for file in files if "mark.gptq" in file.read_text(encoding="utf-8")]
    return [file.relative_to(SHIPPED).as_posix() for file in found]


def _checked(*command: str | Path) -> None:
    code = call(command)
    if code:
        raise SystemExit(code)
