"""Adapters: where they go, how they begin, which files they come in."""
