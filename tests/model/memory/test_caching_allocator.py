"""The arithmetic of torch's caching allocator, by the constants of its source; tests/gpu compares it with torch."""

from __future__ import annotations

import math

import pytest

from onecard.model.memory.caching_allocator import MIB, CachingAllocator, OutOfRoom, Requests

# (bytes asked for, bytes of the block, bytes reserved)
FIGURES = [
    (1, 512, 2 * MIB),
    (513, 1024, 2 * MIB),
    (MIB, MIB, 2 * MIB),
    (MIB + 1, MIB + 512, 20 * MIB),
    (10 * MIB - 1, 10 * MIB, 10 * MIB),
    (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    (11 * MIB + MIB // 2, 12 * MIB, 12 * MIB),  # a rest of at most 1 MiB is not split off
]


@pytest.mark.parametrize(("asked", "block", "reserved"), FIGURES)
def test_a_request_takes_what_torch_takes(asked: int, block: int, reserved: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(asked).size == block
    assert allocator.reserved == reserved


def test_the_smallest_free_block_is_used_again_and_neighbours_become_one() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(n * MIB) for n in (30, 22, 26)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(24 * MIB).address == blocks[2].address
    parts = [allocator.allocate(n * MIB) for n in (23, 7)]
    assert [part.address - blocks[0].address for part in parts] == [0, 23 * MIB]
    for part in parts:
        allocator.free(part)
    assert allocator.allocate(30 * MIB).address == blocks[0].address
    assert allocator.reserved == allocator.most_reserved == 78 * MIB


def test_a_full_card_gives_back_whole_segments_before_it_refuses() -> None:
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    assert allocator.allocate(80 * MIB).size == 80 * MIB and allocator.reserved == 80 * MIB
    with pytest.raises(OutOfRoom) as reason:
        allocator.allocate(30 * MIB)
    assert reason.value.needed == 110 * MIB


def test_a_copy_keeps_the_gaps_and_what_lies_between_them() -> None:
    allocator, requests = CachingAllocator(), Requests()
    whole = requests.take(60 * MIB)
    requests.let_go(whole)
    kept = requests.take(8 * MIB)  # the first 8 of the 60 MiB
    assert requests.most_alive() == 60 * MIB and requests.left() == 8 * MIB
    allocator.serve(requests, [(2, [12 * MIB])])
    assert kept == 1 and allocator.reserved == 60 * MIB, "12 MiB between the two events, 8 behind them"
    other = allocator.copy(math.inf)
    other.give_back()
    assert other.reserved == 60 * MIB
    other.free(other.allocate(40 * MIB))
    other.allocate(41 * MIB)
    assert other.reserved == 102 * MIB and allocator.reserved == 60 * MIB
