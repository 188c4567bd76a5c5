#!/usr/bin/env python3
"""Serve a model over the OpenAI API, and with --web the chat page on the same port.

python tools/serve.py --lora_path outputs/my-first-adapter
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.config.inference import ServeConfig
from onecard.config.parsing import parse
from onecard.console import run_main
from onecard.inference.run_files import stored_by_first


def main() -> None:
    # The adapter knows its base model; what is typed wins over that.
    config = parse(ServeConfig, description=__doc__, stored=stored_by_first)

    from onecard.recipes import serve

    serve(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
