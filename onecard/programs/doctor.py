"""Say what works on this machine: system, packages, card, kernels really run, disk and RAM; each problem has a remedy.

onecard doctor
onecard doctor --json       # for bug reports: no user name, no home path, no token in it
Ends with 1 when something that training needs is broken.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from onecard.config.parsing import parse
from onecard.console import escaped, say
from onecard.errors import ModelError
from onecard.translation import columns_of, translated

COLOURS = {"ok": "32", "warning": "33", "problem": "31"}
WIDTH = 110


@dataclass
class DoctorOptions:
    """How the findings are told."""

    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(DoctorOptions, argv, description=__doc__ or "")

    from onecard.doctor.facts import examine, without_names

    findings = examine()
    counts = {state: sum(finding.state == state for finding in findings) for state in COLOURS}
    if options.json:
        report = {**counts, "findings": [asdict(finding) for finding in findings]}
        say(without_names(json.dumps(report, ensure_ascii=False, indent=1)))
    else:
        say(without_names(as_table(findings)), is_styled=True)
        say(f"\n{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems")
    if counts["problem"]:
        raise ModelError("this machine is not ready to train; mend the problems above from top to bottom")


def as_table(findings: list[Any]) -> str:
    """One finding a line, its remedy below it, ready to print."""
    names = [translated(finding.name) for finding in findings]
    columns = max(map(columns_of, names))
    indent = " " * (columns + 11)
    lines = []
    for name, finding in zip(names, findings, strict=True):
        first, *rest = _wrapped(finding.value, WIDTH - len(indent)) or [""]
        lines.append(f"{_coloured(finding.state)}  {name}{' ' * (columns - columns_of(name))}  {first}")
        lines += [indent + part for part in rest]
        lines += [f"{indent}-> {part}" for part in _wrapped(finding.remedy, WIDTH - len(indent) - 3)]
    return "\n".join(lines)


def _wrapped(message: str, columns: int) -> list[str]:
    text = escaped(translated(message))
    # A Chinese character is two columns wide.
    return wrap(text, columns if text.isascii() else columns // 2, break_long_words=text.isascii())


def _coloured(state: str) -> str:
    word = translated(state)
    shown = word + " " * (7 - columns_of(word))
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[{COLOURS[state]}m{shown}\x1b[0m" if is_coloured else shown
