"""Fine-tune a language model on a file of instructions. `onecard finetune --help` lists every option."""

from __future__ import annotations

from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.model.allocator import prefer_expandable_segments


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(FinetuneConfig, argv, description=__doc__)

    prefer_expandable_segments()
    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import finetune

    finetune(config)
