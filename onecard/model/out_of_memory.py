"""Memory that ran out: which exceptions say so, and letting go of what an attempt has left."""

from __future__ import annotations

import gc

import torch

from onecard.model.hardware import empty_cache

# What CUDA, its libraries and the CPU's allocator (Linux, Windows) say instead of raising OutOfMemoryError.
OTHER_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory",
               "CUDA error: out of memory", "cudaErrorMemoryAllocation", "can't allocate memory",
               "DefaultCPUAllocator: not enough memory")  # fmt: skip


def is_out_of_memory(reason: BaseException) -> bool:
    """Whether an exception says that the card (or the RAM) has no room left."""
    if isinstance(reason, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(reason, RuntimeError) and any(words in str(reason) for words in OTHER_WORDS)


def give_back_memory() -> None:
    """Let go of what the failed attempt left, the allocator's cached blocks too. Call it outside `except`."""
    gc.collect()
    empty_cache()
