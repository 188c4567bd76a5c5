"""Starts the verb of a script of this folder, as onecard/installation.py names it, from the clone it lies in."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import run
from onecard.console import run_main
from onecard.installation import SCRIPTS


def start(script: str) -> None:
    verb = next(verb for verb, known in SCRIPTS.items() if known == f"tools/{Path(script).name}")
    sys.exit(run_main(lambda: run([verb, *sys.argv[1:]])))
