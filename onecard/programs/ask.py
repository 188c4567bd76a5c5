"""Ask a run something while it trains: its present weights answer between two of its steps.

onecard ask outputs/mine "What is the capital of France?"
The same as `onecard control ask`, whose options may follow.
"""

from __future__ import annotations

import sys

from onecard.config.parsing import parse
from onecard.programs.control import Ask, ask

NAMES = ("--run", "--question")  # what words in front of all options are


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = []
    for name in NAMES:
        if words and not words[0].startswith("-"):
            given += [name, words.pop(0)]
    ask(parse(Ask, [*given, *words], description=__doc__ or ""))
