"""Export to Meta's consolidated .pth files."""

from __future__ import annotations
