"""The plan's arithmetic of torch's caching allocator beside torch's own, for the same requests."""

from __future__ import annotations

import random

import pytest
import torch

from onecard.model.allocator import has_expandable_segments
from onecard.model.memory.caching_allocator import CachingAllocator, MemoryBlock
from onecard.model.memory.growing_segments import GrowingSegments
from onecard.model.out_of_memory import give_back_memory

pytestmark = pytest.mark.gpu


def test_what_is_reserved_is_what_the_plan_says() -> None:
    serve_random_requests(GrowingSegments() if has_expandable_segments() else CachingAllocator())


def serve_random_requests(ours: CachingAllocator) -> None:
    """300 requests of 1 KiB to 32 MiB, two of five let go in random order, on a stream that has no blocks yet.

    Of equal free blocks the one with the lower address is taken, and addresses are the driver's: no two are equal here.
    """
    give_back_memory()
    drawn = random.Random(0)
    held: list[tuple[torch.Tensor, MemoryBlock]] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        start = torch.cuda.memory_reserved()
        for number in range(300):
            if held and drawn.random() < 0.4:
                tensor, block = held.pop(drawn.randrange(len(held)))
                del tensor
                ours.free(block)
            else:
                n_bytes = int(2 ** drawn.uniform(10, 25))
                held.append((torch.empty(n_bytes, dtype=torch.uint8, device="cuda"), ours.allocate(n_bytes)))
            if number % 30 == 29:
                torch.cuda.empty_cache()
                ours.give_back()
            assert torch.cuda.memory_reserved() - start == ours.reserved
        held.clear()
    give_back_memory()
