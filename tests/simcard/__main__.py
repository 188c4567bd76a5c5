"""A program on the simulated card: `python -m tests.simcard sm75:11GiB finetune.py --bits 4`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.simcard.build import Unavailable
from tests.simcard.card import install, parse

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("python -m tests.simcard DEVICES PROGRAM.py [its options]")
    try:
        install(parse(sys.argv[1]))
    except (ValueError, Unavailable) as reason:
        sys.exit(f"no simulated card: {reason}")
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
