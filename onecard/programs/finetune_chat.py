"""Fine-tune a language model on conversations. `onecard finetune-chat --help` lists every option."""

from __future__ import annotations

from onecard.installation import SHIPPED
from onecard.programs.finetune import start

DEFAULTS = {
    "dialogue": True,
    "data_path": str(SHIPPED / "sample" / "chat_sample.json"),
    "output_path": "outputs/my-first-chat-adapter",
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    start(argv, __doc__ or "", DEFAULTS)
