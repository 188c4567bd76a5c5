#!/usr/bin/env python3
"""Chat with a model: a page in the browser, or with --cli in this terminal. `--help` lists every option."""

from __future__ import annotations

import sys

from onecard.config.inference import ChatConfig
from onecard.config.parsing import parse
from onecard.console import run_main
from onecard.inference.run_files import stored_by_first


def main() -> None:
    # The adapter knows its base model; what is typed wins over that.
    config = parse(ChatConfig, description=__doc__, stored=stored_by_first)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import chat

    chat(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
