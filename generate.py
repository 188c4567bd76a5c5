#!/usr/bin/env python3
"""`onecard generate` in a clone; onecard/programs/generate.py is the program."""

from __future__ import annotations

import sys

from onecard.console import run_main
from onecard.programs.generate import main

if __name__ == "__main__":
    sys.exit(run_main(main))
