"""What torch's caching allocator reserves where segments grow (`expandable_segments:True`).

The arithmetic of c10/cuda/CUDACachingAllocator.cpp (torch 2.13) where `caching_allocator.py` differs: a pool has
one range of addresses, larger than the card. Pages of 2 MiB (small pool) or 20 MiB (large pool) are mapped into it, at
the lowest place where free blocks and holes in a row hold a request; a rest of 512 bytes is split off in either pool.
Whole pages inside free blocks are given back where the card has no room.
https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from onecard.model.memory.caching_allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    CachingAllocator,
    MemoryBlock,
    OutOfRoom,
)

ADDRESSES = 2**40 // LARGE_SEGMENT * LARGE_SEGMENT  # of a pool: more than any card has


class GrowingSegments(CachingAllocator):
    """As `CachingAllocator`; a hole is a stretch of a pool's addresses that has no pages."""

    smallest_large_rest = MIN_BLOCK

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__(limit)
        self._small_holes = [MemoryBlock(ADDRESSES, 0, self._small)]  # by address, the endless one last
        self._large_holes = [MemoryBlock(ADDRESSES, 0, self._large)]

    def copy(self, limit: float) -> GrowingSegments:
        """An allocator in the same state, in which what is in use stays so for good."""
        other = GrowingSegments(limit)
        other.reserved = other.most_reserved = self.reserved
        in_use = MemoryBlock(0, 0, [])
        for (pool, holes, _), (new, new_holes, _) in zip(self._pools(), other._pools(), strict=True):
            new_holes.clear()
            before = in_use
            for block in sorted([*holes, *(entry[2] for entry in pool)], key=lambda block: block.address):
                same = MemoryBlock(block.size, block.address, new)
                same.before, same.after = in_use, in_use
                if before.address + before.size == block.address:
                    before.after, same.before = same, before
                before = same
                if block.free:
                    other._keep(same)
                else:
                    new_holes.append(same)
        return other

    def give_back(self) -> None:
        """Return the whole pages inside free blocks to the card, as `torch.cuda.empty_cache` does."""
        for pool, holes, page in self._pools():
            for _, _, block in [*pool]:
                begin = -(-block.address // page) * page
                end = (block.address + block.size) // page * page
                if begin < end:
                    self._remove(block)
                    self._unmap(block, begin, end, holes)

    def use_up(self) -> None:
        """Take the free rests of pages of the large pool into use: what would find room there is by chance."""
        for size, *_ in [*self._large]:
            self.allocate(size)

    def _unmap(self, block: MemoryBlock, begin: int, end: int, holes: list[MemoryBlock]) -> None:
        """Make a hole of the addresses from `begin` to `end` of a block that is in no list now."""
        self.reserved -= end - begin
        hole = block
        if block.address < begin:
            hole = _cut(block, begin - block.address)
            self._keep(block)
        if end - begin < hole.size:
            self._keep(_cut(hole, end - begin))
        hole.free = False
        before, after = hole.before, hole.after
        if after in holes:
            holes.remove(after)
            self._join(hole, after)
        if before in holes:
            self._join(before, hole)
        else:
            insort(holes, hole, key=lambda each: each.address)

    def _new_segment(self, size: int, pool: list[tuple[int, int, MemoryBlock]]) -> MemoryBlock:
        holes, page = (self._small_holes, SMALL_SEGMENT) if pool is self._small else (self._large_holes, LARGE_SEGMENT)
        stretch, n_bytes = _lowest_place(size, holes, page)
        if not self._has_room(n_bytes):
            self.give_back()
            stretch, n_bytes = _lowest_place(size, holes, page)
            if not self._has_room(n_bytes):
                raise OutOfRoom(self.reserved + n_bytes)
        self.reserved += n_bytes
        self.most_reserved = max(self.most_reserved, self.reserved)
        first, *others = stretch
        for block in stretch:
            if block.free:
                self._remove(block)
                continue
            place = holes.index(block)
            if block.size > n_bytes:  # the last one
                holes[place] = _cut(block, n_bytes)
            else:
                del holes[place]
            n_bytes -= block.size
        if block.after is not None and block.after.free:  # it joins the pages that are mapped before it
            self._remove(block.after)
            others.append(block.after)
        for block in others:
            self._join(first, block)
        return first

    def _keep(self, block: MemoryBlock) -> None:
        block.free = True
        insort(block.pool, (block.size, block.address, block))

    def _remove(self, block: MemoryBlock) -> None:
        del block.pool[bisect_left(block.pool, (block.size, block.address))]

    def _pools(self) -> Iterator[tuple[list[tuple[int, int, MemoryBlock]], list[MemoryBlock], int]]:
        yield self._small, self._small_holes, SMALL_SEGMENT
        yield self._large, self._large_holes, LARGE_SEGMENT


def _lowest_place(size: int, holes: list[MemoryBlock], page: int) -> tuple[list[MemoryBlock], int]:
    """The lowest free blocks and holes in a row that hold a request, and bytes of pages that are mapped for it."""
    for hole in holes:
        block: MemoryBlock | None = hole if hole.before is None or not hole.before.free else hole.before
        stretch, n_bytes, missing = [], 0, size
        while block is not None and (block.free or block in holes):
            n_mapped = 0 if block.free else min(block.size, -(-missing // page) * page)
            stretch.append(block)
            n_bytes, missing = n_bytes + n_mapped, missing - (n_mapped or block.size)
            if missing <= 0:
                return stretch, n_bytes
            block = block.after
    raise AssertionError("the last hole is endless")


def _cut(block: MemoryBlock, size: int) -> MemoryBlock:
    """Shorten a block to `size` bytes; returns the rest, which is its neighbour now."""
    rest = MemoryBlock(block.size - size, block.address + size, block.pool)
    rest.before, rest.after, block.after, block.size = block, block.after, rest, size
    if rest.after is not None:
        rest.after.before = rest
    return rest
