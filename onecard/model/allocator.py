"""How torch's allocator takes a card's memory: in segments that grow, where the system has them.

In segments of a fixed size a freed block serves requests of about its own size only, and what others leave between them
is lost. torch reads the choice from the environment, once, before its first tensor on a card: no torch is imported
here. https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
"""

from __future__ import annotations

import os
import platform

# The second is the older name of the first.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def prefer_expandable_segments() -> None:
    """Ask for segments that grow, where the system has them and the user asked for nothing. Call it before torch."""
    if not _asked() and _can_expand():
        os.environ[VARIABLES[0]] = EXPANDABLE


def has_expandable_segments() -> bool:
    """Whether segments grow in this process."""
    return _can_expand() and EXPANDABLE in _asked().replace(" ", "")


def _asked() -> str:
    return next(filter(None, map(os.environ.get, VARIABLES)), "")


def _can_expand() -> bool:
    """Linux has them; Windows and WSL, its guest, do not."""
    return platform.system() == "Linux" and "microsoft" not in platform.release().lower()
