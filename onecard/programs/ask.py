"""Ask a run something while it trains: its present weights answer between two of its steps.

onecard ask outputs/mine "What is the capital of France?"
The same as `onecard control ask`, whose options may follow.
"""

from __future__ import annotations

from onecard.config.parsing import parse, words_by_name
from onecard.programs.control import Ask, ask


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    ask(parse(Ask, words_by_name(argv, "--run", "--question"), description=__doc__ or ""))
