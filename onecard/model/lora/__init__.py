"""Adapters: where they go, how they begin, which files they come in."""

from __future__ import annotations
