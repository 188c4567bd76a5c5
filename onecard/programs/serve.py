"""Serve a model over the OpenAI API, and with --web the chat page on the same port.

onecard serve --lora_path outputs/my-first-adapter
"""

from __future__ import annotations

from onecard.config.inference import ServeConfig
from onecard.config.parsing import parse
from onecard.console import say
from onecard.inference.run_files import stored_by_first


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    # The adapter knows its base model; what is typed wins over that.
    config = parse(ServeConfig, argv, description=__doc__, stored=stored_by_first)

    if config.serve.new_key is not None and config.serve.api_keys is not None:
        from onecard.serve.keys import add_key

        key = add_key(config.serve.api_keys, config.serve.new_key)
        say(f"{key}\nis the key of {config.serve.new_key}, shown this once: {config.serve.api_keys} holds its hash")
        return

    from onecard.recipes import serve

    serve(config)
