"""Running out of memory while answering: told with advice, after everything that the attempt held was let go."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onecard.errors import ModelError
from onecard.model.hardware import empty_cache


class OutOfMemory(ModelError):
    """The card's memory is full. The memory of this request is free again, and the next one works."""


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn running out of memory into OutOfMemory with this advice, after everything the attempt held was let go."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        traceback.clear_frames(reason.__traceback__)  # they hold the activations
    release()
    raise OutOfMemory(advice)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says with this that memory is full; on a CPU it has no class of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release() -> None:
    """Give unused memory back."""
    gc.collect()
    empty_cache()
