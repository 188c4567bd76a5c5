"""Fine-tune a language model on conversations. `onecard finetune-chat --help` lists every option."""

from __future__ import annotations

from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.installation import SHIPPED

DEFAULTS = {
    "dialogue": True,
    "data_path": str(SHIPPED / "sample" / "chat_sample.json"),
    "output_path": "outputs/my-first-chat-adapter",
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(FinetuneConfig, argv, description=__doc__, defaults=DEFAULTS)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import finetune

    finetune(config)
