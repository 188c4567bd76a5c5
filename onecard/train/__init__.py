"""One run: its steps, checkpoints, resume, evaluation and trackers."""

from __future__ import annotations
