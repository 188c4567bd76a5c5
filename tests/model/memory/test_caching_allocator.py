"""The arithmetic of torch's caching allocator, by the constants of its source; tests/gpu compares it with torch."""

from __future__ import annotations

import math

import pytest

from onecard.model.memory.caching_allocator import MIB, CachingAllocator, OutOfRoom, Requests
from onecard.model.memory.growing_segments import GrowingSegments

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
    requests.take(12 * MIB)  # the first 12 of the 60 MiB
    requests.take(8 * MIB)
    assert requests.most_alive() == 60 * MIB and requests.left() == 20 * MIB
    allocator.serve(requests)
    assert allocator.reserved == 60 * MIB
    other = allocator.copy(math.inf)
    other.give_back()
    assert other.reserved == 60 * MIB
    other.free(other.allocate(40 * MIB))
    other.allocate(41 * MIB)
    assert other.reserved == 102 * MIB and allocator.reserved == 60 * MIB


def test_a_growing_segment_maps_pages_where_a_request_does_not_fit() -> None:
    allocator = GrowingSegments()
    whole = allocator.allocate(30 * MIB)
    assert allocator.reserved == 40 * MIB, "two pages of 20"
    after = allocator.allocate(10 * MIB - 512)
    assert (after.address - whole.address, allocator.reserved) == (30 * MIB, 40 * MIB)
    last = allocator.allocate(MIB + 512)
    assert last.address - whole.address == 40 * MIB - 512, "after the rest of 512 bytes, in the third page"
    allocator.free(whole)
    assert allocator.allocate(50 * MIB).address > whole.address and allocator.reserved == 100 * MIB
    allocator.allocate(512)
    assert allocator.reserved == 102 * MIB, "small requests have a segment of their own"


def test_growing_segments_give_back_pages_and_use_holes_again() -> None:
    allocator = GrowingSegments(limit=100 * MIB)
    first, second, third, _ = (allocator.allocate(20 * MIB) for _ in range(4))
    allocator.free(first)
    allocator.give_back()
    allocator.free(second)
    assert allocator.reserved == 60 * MIB
    both = allocator.allocate(40 * MIB)
    assert both.address == first.address and allocator.reserved == 80 * MIB, "a hole and the free block behind it"
    allocator.free(third)
    with pytest.raises(OutOfRoom) as reason:
        allocator.allocate(50 * MIB)
    assert reason.value.needed == 120 * MIB, "60 in use; the free page is given back, and three are missing"
    assert allocator.allocate(40 * MIB).size == 40 * MIB and allocator.reserved == 100 * MIB


def test_rests_of_pages_can_be_used_up() -> None:
    allocator = GrowingSegments()
    kept = allocator.allocate(30 * MIB)
    allocator.allocate(512)
    allocator.use_up()
    assert allocator.reserved == 42 * MIB and allocator.allocate(5 * MIB).address - kept.address == 40 * MIB


def test_a_copy_of_growing_segments_keeps_blocks_and_holes_side_by_side() -> None:
    allocator = GrowingSegments()
    blocks = [allocator.allocate(20 * MIB) for _ in range(5)]
    for number in (0, 2):
        allocator.free(blocks[number])
    allocator.give_back()
    allocator.free(blocks[1])
    other = allocator.copy(math.inf)
    assert other.allocate(60 * MIB).address == blocks[0].address and other.reserved == 100 * MIB
    assert other.allocate(20 * MIB).address == blocks[4].address + 20 * MIB
    assert allocator.reserved == 60 * MIB, "the first is as it was"


def test_all_limits_from_what_was_reserved_to_what_was_refused_go_the_same_way() -> None:
    requests = Requests()
    first = requests.take(40 * MIB)
    requests.take(6 * MIB)  # of a segment of 20 MiB
    requests.let_go(first)
    requests.take(50 * MIB)  # 110 MiB are reserved then, or 70 where the 40 are given back
    requests.take(30 * MIB)  # of the 40, or 100 MiB
    requests.take(300 * MIB)

    def outcome(limit: float) -> tuple[bool, int, float]:
        allocator, ran = CachingAllocator(limit), True
        try:
            allocator.serve(requests)
        except OutOfRoom:
            ran = False
        return ran, allocator.most_reserved, allocator.refused

    ranges = [(40, 60), (60, 70), (70, 100), (100, 110), (110, 410), (410, math.inf)]
    for low, high in ranges:
        for limit in (low * MIB, (low + 5) * MIB, min(high * MIB - 1, 500 * MIB)):
            assert outcome(limit) == (low == 410, low * MIB, high * MIB), (limit / MIB, low)
