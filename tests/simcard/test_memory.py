"""The simulated card's memory: the figures of torch's allocator, its limits and its statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from onecard.model.memory.growing_segments import GrowingSegments
from tests.gpu.test_caching_allocator import serve_random_requests
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

MIB = 2**20


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    """A stream of its own, since each stream has its own blocks."""
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def take(n_bytes: int, device: str = "cuda:0") -> torch.Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def limit_to(n_bytes: int) -> None:
    """Leave this many bytes beyond what is reserved."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes + 1) / total)


# (bytes asked for, bytes allocated, bytes reserved): the constants of CUDACachingAllocator.cpp.
FIGURES = [
    (1, 512, 2 * MIB),
    (513, 1024, 2 * MIB),
    (MIB, MIB, 2 * MIB),
    (MIB + 1, MIB + 512, 20 * MIB),
    (10 * MIB - 1, 10 * MIB, 10 * MIB),
    (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    (10 * MIB + MIB // 2, 10 * MIB + MIB // 2, 12 * MIB),  # a rest of more than 1 MiB is split off
    (11 * MIB + MIB // 2, 12 * MIB, 12 * MIB),  # one of half a MiB is not
]


@pytest.mark.parametrize(("asked", "allocated", "reserved"), FIGURES)
def test_a_request_takes_what_the_allocator_of_torch_takes(asked: int, allocated: int, reserved: int) -> None:
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    tensor = take(asked)
    assert torch.cuda.memory_allocated() - before[0] == allocated
    assert torch.cuda.memory_reserved() - before[1] == reserved
    del tensor
    assert torch.cuda.memory_allocated() == before[0]
    assert torch.cuda.memory_reserved() - before[1] == reserved
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before[1]


def test_a_freed_block_is_used_again_and_the_smallest_that_fits_is_taken() -> None:
    blocks = [take(n * MIB) for n in (30, 22, 26)]
    addresses = [block.data_ptr() for block in blocks]
    reserved = torch.cuda.memory_reserved()
    blocks.clear()
    again = take(24 * MIB)
    assert again.data_ptr() == addresses[2] and torch.cuda.memory_reserved() == reserved


def test_neighbours_that_are_free_become_one_block() -> None:
    whole = take(40 * MIB)
    address = whole.data_ptr()
    del whole
    parts = [take(20 * MIB), take(20 * MIB)]
    assert sorted(part.data_ptr() - address for part in parts) == [0, 20 * MIB]
    parts.clear()
    assert take(40 * MIB).data_ptr() == address


def test_more_than_the_limit_raises_out_of_memory_and_less_still_works() -> None:
    limit_to(64 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 80\.00 MiB.*simulated card"):
        take(80 * MIB)
    kept = take(40 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        take(40 * MIB)
    del kept
    assert take(60 * MIB).numel() == 60 * MIB  # the free segment of 40 MiB is given back first


def test_more_than_the_card_raises_out_of_memory() -> None:
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total
    with pytest.raises(torch.OutOfMemoryError):
        take(free + MIB)


def test_memory_stats_count_retries_failures_and_peaks() -> None:
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    before = torch.cuda.memory_stats()
    take(3 * MIB)
    take(30 * MIB)
    limit_to(0)
    with pytest.raises(torch.OutOfMemoryError):
        take(60 * MIB)
    after = torch.cuda.memory_stats()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["allocation.all.allocated"] == 2 and grown["allocation.all.current"] == 0
    assert grown["allocated_bytes.all.peak"] == 30 * MIB and grown["requested_bytes.all.allocated"] == 33 * MIB
    assert grown["num_ooms"] == 1 and grown["num_alloc_retries"] == 1
    assert grown["reserved_bytes.all.current"] == 0 and grown["segment.large_pool.freed"] == 2
    assert torch.cuda.max_memory_allocated() - before["allocated_bytes.all.current"] == 30 * MIB


def test_a_split_block_is_counted_as_inactive() -> None:
    before = torch.cuda.memory_stats()["inactive_split_bytes.all.current"]
    take(30 * MIB)
    small = take(2 * MIB)  # the first 2 of the 30 MiB
    assert torch.cuda.memory_stats()["inactive_split_bytes.all.current"] - before == 28 * MIB
    del small
    assert torch.cuda.memory_stats()["inactive_split_bytes.all.current"] == before


def fragment() -> torch.Tensor:
    """40 MiB at the start of 100 MiB that are reserved."""
    take(100 * MIB)
    return take(40 * MIB)


def test_expandable_segments_use_the_rest_of_a_segment(card: Card) -> None:
    with card.behaving(garbage=card.spec.garbage):
        limit_to(140 * MIB)
        kept = fragment()
        with pytest.raises(torch.OutOfMemoryError):
            take(80 * MIB)
        del kept
        torch.cuda.empty_cache()
    with card.behaving(garbage=card.spec.garbage, expandable=True):
        reserved = torch.cuda.memory_reserved()
        kept = fragment()
        other = take(80 * MIB)
        assert torch.cuda.memory_reserved() - reserved == 120 * MIB
        assert other.data_ptr() - kept.data_ptr() == 40 * MIB
        other.fill_(7)
        kept.fill_(1)
        assert int(other.sum(dtype=torch.int64)) == 7 * 80 * MIB
        del kept
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - reserved == 80 * MIB
        del other
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved


def test_pages_are_mapped_around_a_free_block(card: Card) -> None:
    """Of four blocks in a row the first is given back and the second free: both hold what is twice as large."""
    with card.behaving(garbage=card.spec.garbage, expandable=True):
        reserved = torch.cuda.memory_reserved()
        blocks = [take(20 * MIB) for _ in range(4)]
        first = blocks[0].data_ptr()
        blocks[0] = take(0)
        torch.cuda.empty_cache()
        blocks[1] = take(0)
        both = take(40 * MIB)
        assert both.data_ptr() == first and torch.cuda.memory_reserved() - reserved == 80 * MIB
        both.fill_(3)
        blocks[2].fill_(1)
        assert int(both.sum(dtype=torch.int64)) == 3 * 40 * MIB


def test_growing_segments_reserve_what_the_plan_says(card: Card) -> None:
    with card.behaving(garbage=card.spec.garbage, expandable=True):
        serve_random_requests(GrowingSegments())


def test_the_allocation_that_is_told_to_fails_and_the_next_does_not(card: Card) -> None:
    card.native.fail_after(0, 1)
    kept = take(512)
    with pytest.raises(torch.OutOfMemoryError):
        take(512)
    assert take(512).data_ptr() != kept.data_ptr()


def test_new_memory_is_garbage_and_freed_memory_too(card: Card) -> None:
    with card.behaving(garbage=True):
        values = torch.empty(1000, device="cuda")
        assert values.isnan().all()
        values.fill_(1)
        del values
        assert torch.empty(1000, device="cuda").isnan().all()
        assert torch.empty(5, dtype=torch.int32, device="cuda").eq(-1).all()


def test_pinned_memory_is_counted_in_powers_of_two_and_limited(card: Card) -> None:
    before = card.native.pinned_bytes()
    buffer = torch.empty(3 * MIB + 1, dtype=torch.uint8, pin_memory=True)
    assert buffer.is_pinned() and not torch.empty(10).is_pinned()
    taken = card.native.pinned_bytes() - before
    assert taken in (0, 4 * MIB)  # 0 where an earlier test left a block of this size
    card.native.limit_pinned(card.native.pinned_bytes())
    try:
        with pytest.raises(RuntimeError, match="pinned memory"):
            torch.empty(900 * MIB, dtype=torch.uint8, pin_memory=True)
    finally:
        card.native.limit_pinned(-1)


def test_shapes_only_takes_memory_and_computes_nothing_large(card: Card) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with card.shapes_only():
        a = torch.empty(20_000, 20_000, dtype=torch.float16, device="cuda")  # of which the CPU touches no byte
        b = a @ a
        assert b.shape == a.shape
        assert float(torch.ones(3, device="cuda").sum()) == 3
        assert torch.cuda.memory_allocated() - before >= 2 * a.numel() * 2


@pytest.mark.parametrize(("n_bytes", "first"), [(MIB, 255), (64 * MIB, 1)])
def test_shapes_only_leaves_large_pinned_memory_untouched(card: Card, n_bytes: int, first: int) -> None:
    """The weights of a model that lie there take none of the machine's RAM."""
    with card.behaving(garbage=True), card.shapes_only():
        torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).fill_(1)
        again = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        assert int(again[0]) == first  # 255 is garbage


@pytest.mark.parametrize(("rows", "length"), [(2, 32_768), (1, 57_984), (1, 200_000)])
def test_shapes_only_computes_the_positions_of_long_rows(card: Card, rows: int, length: int) -> None:
    """By which transformers decides whether a row holds several texts; for those it makes a mask of length x length."""
    from transformers.masking_utils import find_packed_sequence_indices

    with card.shapes_only():
        positions = torch.arange(length, device="cuda")[None].expand(rows, -1)
        assert find_packed_sequence_indices(positions) is None
        several = find_packed_sequence_indices(positions % (length // 2))
        assert several is not None and several[:, -1].tolist() == [1] * rows
