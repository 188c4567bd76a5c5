"""Fine-tune a language model on a file of instructions. `onecard finetune --help` lists every option."""

from __future__ import annotations

import sys
from typing import Any

from onecard.config.parsing import parse
from onecard.config.stages import parse_stages
from onecard.config.training import FinetuneConfig
from onecard.model.allocator import prefer_expandable_segments


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    start(argv, __doc__ or "")


def start(argv: list[str] | None, description: str, defaults: dict[str, Any] | None = None) -> None:
    """Run what a command line says: one run, or the stages of a file."""
    words = list(sys.argv[1:] if argv is None else argv)
    stages = parse_stages(words, description=description, defaults=defaults or {})
    config = None if stages else parse(FinetuneConfig, words, description=description, defaults=defaults)
    prefer_expandable_segments()
    # Imported after the options are known to be good: torch takes seconds to load.
    if config is None:
        from onecard.stages import finetune_stages

        finetune_stages(stages)
        return
    from onecard.recipes import finetune

    finetune(config)
