"""Many questions from a file, and held-out losses."""

from __future__ import annotations
