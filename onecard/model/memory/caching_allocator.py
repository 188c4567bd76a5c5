"""What torch's caching allocator reserves for a sequence of requests, in segments of a fixed size.

The arithmetic of c10/cuda/CUDACachingAllocator.cpp (torch 2.13) with its default settings, as
https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management describes it:

- a request is rounded up to 512 bytes; up to 1 MiB it comes from the small pool, else from the large one;
- the smallest free block that is large enough is taken; a rest of at least 512 bytes (small pool) or of more than 1 MiB
  (large pool) is split off and stays free;
- where there is none, a segment is taken from the card: 2 MiB for the small pool, 20 MiB for requests under 10 MiB,
  else the request rounded up to 2 MiB; where the card has no room, free segments are given back first;
- a freed block joins its free neighbours and stays reserved.

Of free blocks of one size the one with the lowest address is taken. Where a driver puts segments is its own affair;
here each lies below those before it, as on the simulated card. With each above, what steps need changed by up to 4 %.
One stream; it knows numbers of bytes alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
MIN_BLOCK, SMALL_REQUEST, SMALL_SEGMENT = 512, MIB, 2 * MIB
MIN_LARGE, LARGE_SEGMENT, ROUND_LARGE = 10 * MIB, 20 * MIB, 2 * MIB


class OutOfRoom(Exception):
    """The limit does not hold a request. `needed`: the limit under which this request would have been served."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} bytes would have to be reserved")
        self.needed = needed


@dataclass
class Requests:
    """A sequence of requests to an allocator.

    sizes: bytes of each. events: the number of a request when it is made, and ~number when its memory is let go.
    """

    sizes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def take(self, n_bytes: float) -> int:
        """Add a request; returns its number."""
        self.sizes.append(round(n_bytes))
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def let_go(self, *numbers: int) -> None:
        """Add that the memory of these requests is let go."""
        self.events += [~number for number in numbers]

    def most_alive(self) -> int:
        """Bytes that are asked for at the worst moment."""
        now = most = 0
        for event in self.events:
            now += self.sizes[event] if event >= 0 else -self.sizes[~event]
            most = max(most, now)
        return most

    def left(self) -> int:
        """Bytes that are never let go."""
        return sum(self.sizes[event] if event >= 0 else -self.sizes[~event] for event in self.events)


class MemoryBlock:
    """A stretch of a segment, in use or free, and its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, size: int, address: int, pool: list[tuple[int, int, MemoryBlock]]) -> None:
        self.size, self.address, self.pool, self.free = size, address, pool, False
        self.before: MemoryBlock | None = None
        self.after: MemoryBlock | None = None


class CachingAllocator:
    """Reserves at most `limit` bytes. `reserved`: now; `most_reserved`: the most so far.

    refused: the least that the limit did not hold so far. Under every limit from `most_reserved` to below it all went
    the same way.
    """

    smallest_large_rest = SMALL_REQUEST + MIN_BLOCK  # of a block of the large pool, to be split off

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.reserved = self.most_reserved = 0
        self.refused = math.inf
        self._small: list[tuple[int, int, MemoryBlock]] = []  # free blocks by size, then address
        self._large: list[tuple[int, int, MemoryBlock]] = []
        self._lowest_address = 0

    def allocate(self, n_bytes: int) -> MemoryBlock:
        """Serve a request. Raises OutOfRoom."""
        size = -(-n_bytes // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK
        small = size <= SMALL_REQUEST
        pool = self._small if small else self._large
        at = bisect_left(pool, (size,))
        block = pool.pop(at)[2] if at < len(pool) else self._new_segment(size, pool)
        block.free = False
        left = block.size - size
        if left >= (MIN_BLOCK if small else self.smallest_large_rest):
            rest, after = MemoryBlock(left, block.address + size, pool), block.after
            rest.before, rest.after, rest.free, block.after, block.size = block, after, True, rest, size
            if after is not None:
                after.before = rest
            insort(pool, (left, rest.address, rest))
        return block

    def free(self, block: MemoryBlock) -> None:
        """Take a block back; it joins its free neighbours."""
        pool, before, after = block.pool, block.before, block.after
        if after is not None and after.free:
            del pool[bisect_left(pool, (after.size, after.address))]
            self._join(block, after)
        if before is not None and before.free:
            del pool[bisect_left(pool, (before.size, before.address))]
            self._join(before, block)
            block = before
        block.free = True
        insort(pool, (block.size, block.address, block))

    def serve(self, requests: Requests) -> None:
        """Serve a sequence of requests; what it never lets go of stays in use. Raises OutOfRoom."""
        sizes, blocks, allocate, free = requests.sizes, {}, self.allocate, self.free
        for event in requests.events:
            if event >= 0:
                blocks[event] = allocate(sizes[event])
            else:
                free(blocks.pop(~event))

    def copy(self, limit: float) -> CachingAllocator:
        """An allocator in the same state, in which what is in use stays so for good."""
        other = CachingAllocator(limit)
        other.reserved = other.most_reserved = self.reserved
        other._lowest_address = self._lowest_address
        in_use = MemoryBlock(0, 0, [])
        for pool, new in ((self._small, other._small), (self._large, other._large)):
            for size, address, block in pool:
                same = MemoryBlock(size, address, new)
                same.free = True
                same.before, same.after = block.before and in_use, block.after and in_use
                new.append((size, address, same))
        return other

    def give_back(self) -> None:
        """Return the segments in which nothing is in use to the card, as `torch.cuda.empty_cache` does."""
        for pool in (self._small, self._large):
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            pool[:] = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]

    def _new_segment(self, size: int, pool: list[tuple[int, int, MemoryBlock]]) -> MemoryBlock:
        if pool is self._small:
            n_bytes = SMALL_SEGMENT
        else:
            n_bytes = LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if not self._has_room(n_bytes):
            self.give_back()
            if not self._has_room(n_bytes):
                raise OutOfRoom(self.reserved + n_bytes)
        self.reserved += n_bytes
        self.most_reserved = max(self.most_reserved, self.reserved)
        self._lowest_address -= n_bytes
        return MemoryBlock(n_bytes, self._lowest_address, pool)

    def _has_room(self, n_bytes: int) -> bool:
        total = self.reserved + n_bytes
        if total > self.limit:
            self.refused = min(self.refused, total)
        return total <= self.limit

    @staticmethod
    def _join(block: MemoryBlock, after: MemoryBlock) -> None:
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            after.after.before = block
