#!/usr/bin/env python3
"""`onecard chat` in a clone; onecard/programs/chat.py is the program."""

from __future__ import annotations

import sys

from onecard.console import run_main
from onecard.programs.chat import main

if __name__ == "__main__":
    sys.exit(run_main(main))
