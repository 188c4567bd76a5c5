#!/usr/bin/env python3
"""`onecard quantize` in a clone; onecard/programs/quantize.py is the program."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.console import run_main
from onecard.programs.quantize import main

if __name__ == "__main__":
    sys.exit(run_main(main))
