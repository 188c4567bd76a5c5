#!/usr/bin/env python3
"""Fine-tune a language model on a file of instructions. `python finetune.py --help` lists every option."""

from __future__ import annotations

import sys

from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.console import run_main


def main() -> None:
    config = parse(FinetuneConfig, description=__doc__)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import finetune

    finetune(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
