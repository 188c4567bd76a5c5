#!/usr/bin/env python3
"""Fine-tune a language model on conversations. `python finetune_chat.py --help` lists every option."""

from __future__ import annotations

import sys

from onecard.config.parsing import parse
from onecard.config.training import REPOSITORY, FinetuneConfig
from onecard.console import run_main

DEFAULTS = {
    "dialogue": True,
    "data_path": str(REPOSITORY / "sample" / "chat_sample.json"),
    "output_path": "outputs/my-first-chat-adapter",
}


def main() -> None:
    config = parse(FinetuneConfig, description=__doc__, defaults=DEFAULTS)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import finetune

    finetune(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
