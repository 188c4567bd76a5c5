#!/usr/bin/env python3
"""`onecard studio` in a clone; onecard/programs/studio.py is the program."""

from __future__ import annotations

from _clone import start

if __name__ == "__main__":
    start(__file__)
