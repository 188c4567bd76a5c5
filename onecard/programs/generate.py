"""Ask a model: one --instruction, a file of them (--data_path), or one after another. `--help` lists every option."""

from __future__ import annotations

from onecard.config.inference import GenerateConfig
from onecard.config.parsing import parse
from onecard.inference.run_files import stored_by_first


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    # The run knows its base model; what is typed wins over that.
    config = parse(GenerateConfig, argv, description=__doc__, stored=stored_by_first)

    # Imported after the options are known to be good: torch takes seconds to load.
    from onecard.recipes import generate

    generate(config)
