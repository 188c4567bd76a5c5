#!/usr/bin/env python3
"""`onecard finetune-chat` in a clone; onecard/programs/finetune_chat.py is the program."""

from __future__ import annotations

import sys

from onecard.console import run_main
from onecard.programs.finetune_chat import main

if __name__ == "__main__":
    sys.exit(run_main(main))
