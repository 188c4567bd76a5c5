"""A trained model in the forms that other programs read."""

from __future__ import annotations
