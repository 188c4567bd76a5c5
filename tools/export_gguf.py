#!/usr/bin/env python3
"""`onecard gguf` in a clone; onecard/programs/gguf.py is the program."""

from __future__ import annotations

from _clone import start

if __name__ == "__main__":
    start(__file__)
