"""OneCard: fine-tune, resume, chat with and quantise language models on the one GPU you own."""

from __future__ import annotations

__version__ = "0.1.0"
