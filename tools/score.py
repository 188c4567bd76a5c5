#!/usr/bin/env python3
"""`onecard score` in a clone; onecard/programs/score.py is the program."""

from __future__ import annotations

from _clone import start

if __name__ == "__main__":
    start(__file__)
