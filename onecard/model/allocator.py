"""How memory is taken: a card's by torch, in segments that grow where the system has them; RAM's by the C library.

In segments of a fixed size a freed block serves requests of about its own size only, and what others leave between them
is lost. torch reads the choice from the environment, once, before its first tensor on a card: no torch is imported
here. https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
"""

from __future__ import annotations

import ctypes
import os
import platform

# The second is the older name of the first.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
# glibc's malloc.h. Left alone, glibc raises its threshold to 32 MiB, and most activations then share a heap whose freed
# blocks stay with the process: a 135M model, 8 rows of 256 tokens, held 1.7 times its tensors without checkpointing and
# 3.1 times with it. Mapped by themselves, blocks took what they are, and a step a third more CPU time.
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**20
HEAP_GROWTH = 4  # so much of the tensors' memory the heap may need, by the above with room to spare


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


def give_back_freed_ram() -> bool:
    """Have large blocks of RAM returned to the system as soon as they are freed; whether the C library can (glibc).

    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
