"""Running out of memory while answering: told with advice, after everything that the attempt held was let go."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from onecard.errors import ModelError
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory


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
    give_back_memory()
    raise OutOfMemory(advice)
