"""Adapters merged into the base, each tensor compared with its source."""
