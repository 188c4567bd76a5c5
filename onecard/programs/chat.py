"""Chat with a model: a page in the browser, or with --cli in this terminal. `--help` lists every option."""

from __future__ import annotations

from onecard.config.inference import ChatConfig
from onecard.config.parsing import parse
from onecard.inference.run_files import stored_by_first


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    # The adapter knows its base model; what is typed wins over that.
    config = parse(ChatConfig, argv, description=__doc__, stored=stored_by_first)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import chat

    chat(config)
