// The card's memory: the arithmetic of torch's CUDA caching allocator over host memory.
// After c10/cuda/CUDACachingAllocator.cpp of torch 2.13 with its default settings:
//   - a request is rounded up to 512 bytes; up to 1 MiB it comes from the small pool, else from the large one;
//   - the smallest free block of the same stream that is large enough is taken; a rest of at least 512 bytes (small
//     pool) or more than 1 MiB (large pool) is split off and stays free;
//   - where none is, a segment is taken from the card: 2 MiB for the small pool, 20 MiB for requests under 10 MiB,
//     else the request rounded up to 2 MiB; if the card has no room, free segments are given back first;
//   - a freed block joins its free neighbours and stays reserved;
//   - with expandable segments there is one address range per pool and stream, whose pages (2 MiB small, 20 MiB large)
//     are taken and given back one by one.
// Not modelled: max_split_size, garbage collection thresholds, graph pools, user-defined pools.
#pragma once

#include <c10/core/Allocator.h>

#include <cstring>
#include <sstream>

#include "block.h"

namespace simcard {

constexpr size_t kMinBlock = 512, kSmallRequest = kMiB, kSmallSegment = 2 * kMiB;
constexpr size_t kMinLarge = 10 * kMiB, kLargeSegment = 20 * kMiB, kRoundLarge = 2 * kMiB;

inline bool fill_with_garbage = false;
inline bool expandable_segments = false;
// Tensors of more bytes than this have a shape and memory but are not computed, nor filled: "shapes only".
inline constexpr int64_t kEveryByte = std::numeric_limits<int64_t>::max();
inline int64_t computed_bytes = kEveryByte;
// Of positions, ids and masks: models choose a way by their values, so a long row's must be right.
inline int64_t computed_index_bytes() { return computed_bytes > kEveryByte / 64 ? kEveryByte : 64 * computed_bytes; }

class CardAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const int device = current_device;
    c10::Device where(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    if (n == 0) return {nullptr, where};
    Block* block = take(device, n);
    block->filled = fill_with_garbage && static_cast<int64_t>(n) <= computed_bytes;
    garbage(block);
    return {block->address, block->address, &CardAllocator::free_address, where};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &CardAllocator::free_address; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    Lock lock(mutex);
    synchronize_device(-1);
    for (int device = 0; device < n_devices; ++device) release_cached(cards[device]);
  }
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Lock lock(mutex);
    auto at = live_.find(static_cast<char*>(pointer.get()));
    if (at != live_.end() && at->second->stream != stream.id()) at->second->used_by.insert(stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Lock lock(mutex);
    return cards[device].stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    each_stat(device, [](Stat& stat) { stat.reset_accumulated(); });
    cards[device].stats.num_alloc_retries = cards[device].stats.num_ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    each_stat(device, [](Stat& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    Lock lock(mutex);
    const Card& card = cards[device];
    const size_t used = card.context + card.reserved();
    return {card.total - std::min(card.total, used), card.total};
  }
  // The live block around an address of the card, or null.
  Block* find(const void* address) {
    auto at = live_.upper_bound(static_cast<char*>(const_cast<void*>(address)));
    if (at == live_.begin()) return nullptr;
    Block* block = (--at)->second;
    return address < block->address + block->size ? block : nullptr;
  }

 private:
  std::map<char*, Block*> live_;

  template <class F>
  void each_stat(c10::DeviceIndex device, F change) {
    Lock lock(mutex);
    auto& s = cards[device].stats;
    for (StatArray* array : {&s.allocation, &s.segment, &s.active, &s.inactive_split, &s.allocated_bytes,
                             &s.reserved_bytes, &s.active_bytes, &s.inactive_split_bytes, &s.requested_bytes})
      for (Stat& stat : *array) change(stat);
  }

  // Bytes that read as NaN, -1 or 255, in the order of the block's own stream.
  static void garbage(const Block* block) {
    const size_t n = block->requested;
    if (!block->filled) return;
    char* address = block->address;
    enqueue({block->device, block->stream}, [address, n] { std::memset(address, 0xFF, n); });
  }

  static void into_pool(Card& card, Block* block) {
    card.pools[block->small].insert(block);
    if (!block->is_split()) return;
    count(card.stats.inactive_split, block, 1);
    count(card.stats.inactive_split_bytes, block, block->size);
  }
  static void out_of_pool(Card& card, Block* block) {
    card.pools[block->small].erase(block);
    if (!block->is_split()) return;
    count(card.stats.inactive_split, block, -1);
    count(card.stats.inactive_split_bytes, block, -static_cast<int64_t>(block->size));
  }

  Block* take(int device, size_t requested) {
    Lock lock(mutex);
    Card& card = cards[device];
    if (card.fail_after >= 0 && card.fail_after-- == 0) out_of_memory(device, requested);
    collect(card, false);
    const size_t size = std::max(kMinBlock, round_up(requested, kMinBlock));
    const bool small = size <= kSmallRequest;
    const int64_t stream = current_stream[device];
    Block* block = best_fit(card.pools[small], stream, size);
    if (block) out_of_pool(card, block);
    else block = new_segment(device, stream, small, size);
    if (!block) { // give back what is free, once nothing reads it any more
      card.stats.num_alloc_retries++;
      synchronize_device(device);
      release_cached(card);
      block = new_segment(device, stream, small, size);
    }
    if (!block) out_of_memory(device, requested);
    split(card, block, size);
    block->allocated = true;
    block->requested = requested;
    block->writer = {-1, 0};
    live_[block->address] = block;
    count(card.stats.allocation, block, 1);
    count(card.stats.active, block, 1);
    count(card.stats.allocated_bytes, block, block->size);
    count(card.stats.active_bytes, block, block->size);
    count(card.stats.requested_bytes, block, requested);
    return block;
  }

  static Block* best_fit(const Pool& pool, int64_t stream, size_t size) {
    Block wanted{0, stream, false, nullptr, size};
    auto at = pool.lower_bound(&wanted);
    return at != pool.end() && (*at)->stream == stream ? *at : nullptr;
  }

  // Memory from the card for a request of `size`; null if there is no room.
  static Block* new_segment(int device, int64_t stream, bool small, size_t size) {
    Card& card = cards[device];
    if (expandable_segments) return expand(device, stream, small, size);
    const size_t n = small ? kSmallSegment : size < kMinLarge ? kLargeSegment : round_up(size, kRoundLarge);
    if (card.reserved() + n > card.room()) return nullptr;
    auto* block = new Block{device, stream, small, map_memory(n), n};
    reserve(card, block, n);
    count(card.stats.segment, block, 1);
    return block;
  }
  static void reserve(Card& card, const Block* block, int64_t n) {
    count(card.stats.reserved_bytes, block, n);
    (n > 0 ? card.stats.num_device_alloc : card.stats.num_device_free)++;
  }

  // Maps pages at the lowest place of the pool's address range where unmapped holes and free blocks in a row hold the
  // request, as find_expandable_block and try_allocate_expandable_block do.
  static Block* expand(int device, int64_t stream, bool small, size_t size) {
    Card& card = cards[device];
    auto usable = [&](Block* one) { return one && (!one->mapped || (!one->allocated && is_free(card, one))); };
    Block* block = nullptr;
    for (Block* hole : card.unmapped[small]) {
      if (hole->stream != stream) continue;
      Block* first = usable(hole->before) ? hole->before : hole;
      size_t room = 0;
      for (Block* one = first; room < size && usable(one); one = one->after) room += one->size;
      if (room >= size && (!block || first->address < block->address)) block = first;
    }
    if (!block) {
      const size_t range = round_up(card.total + card.total / 8, kLargeSegment);
      block = new Block{device, stream, small, map_memory(range), range};
      block->mapped = false;
      card.unmapped[small].insert(block);
    }
    if (!block->mapped && !map_pages(card, block, size)) return nullptr;
    while (block->size < size) {
      Block* hole = block->after;
      if (!map_pages(card, hole, size - block->size)) return nullptr;
      block = hole; // which has absorbed it
    }
    out_of_pool(card, block);
    return block;
  }
  // Maps at least `size` bytes of a hole, or all of it, which then joins its free neighbours; false if there is no room.
  static bool map_pages(Card& card, Block* hole, size_t size) {
    const size_t n = std::min(hole->size, round_up(size, hole->small ? kSmallSegment : kLargeSegment));
    if (card.reserved() + n > card.room()) return false;
    card.unmapped[hole->small].erase(hole);
    cut(hole, n, [&](Block* rest) { rest->mapped = false; card.unmapped[rest->small].insert(rest); });
    hole->mapped = true;
    reserve(card, hole, n);
    join_neighbours(card, hole);
    return true;
  }

  // Shortens a block to `size` and hands the rest on.
  template <class F>
  static void cut(Block* block, size_t size, F with_rest) {
    if (block->size == size) return;
    auto* rest = new Block{block->device, block->stream, block->small, block->address + size, block->size - size};
    rest->before = block;
    rest->after = block->after;
    if (rest->after) rest->after->before = rest;
    block->after = rest;
    block->size = size;
    with_rest(rest);
  }
  // Lengthens a block by a neighbour, which ceases to be.
  static void absorb(Block* block, Block* other) {
    if (other == block->before) {
      block->address = other->address;
      block->before = other->before;
      if (block->before) block->before->after = block;
    } else {
      block->after = other->after;
      if (block->after) block->after->before = block;
    }
    block->size += other->size;
    delete other;
  }
  static void split(Card& card, Block* block, size_t size) {
    const size_t rest = block->size - size;
    if (block->small || expandable_segments ? rest >= kMinBlock : rest > kSmallRequest)
      cut(block, size, [&](Block* other) { into_pool(card, other); });
  }

  static void free_address(void* address);

  void free_block(Block* block) {
    Card& card = cards[block->device];
    live_.erase(block->address);
    count(card.stats.allocation, block, -1);
    count(card.stats.allocated_bytes, block, -static_cast<int64_t>(block->size));
    count(card.stats.requested_bytes, block, -static_cast<int64_t>(block->requested));
    if (block->used_by.empty()) return to_pool(card, block);
    std::vector<std::pair<StreamKey, int64_t>> readers;
    for (int64_t stream : block->used_by) {
      StreamKey key{block->device, stream};
      readers.push_back({key, queues[key].position});
    }
    block->used_by.clear();
    card.in_use.push_back({block, std::move(readers)});
    collect(card, false);
  }

  // Returns freed blocks that no other stream reads any more.
  void collect(Card& card, bool all) {
    auto waiting = std::move(card.in_use);
    card.in_use.clear();
    for (auto& [block, readers] : waiting) {
      bool busy = false;
      for (auto& [key, position] : readers) {
        const auto& jobs = queues[key].jobs;
        busy = busy || (!jobs.empty() && jobs.front().position <= position);
      }
      if (busy && !all) card.in_use.push_back({block, readers});
      else to_pool(card, block);
    }
  }

  static void to_pool(Card& card, Block* block) {
    count(card.stats.active, block, -1);
    count(card.stats.active_bytes, block, -static_cast<int64_t>(block->size));
    block->allocated = false;
    garbage(block); // whoever still reads this reads NaN
    join_neighbours(card, block);
  }
  // A block that has become free, with its free neighbours.
  static void join_neighbours(Card& card, Block* block) {
    for (Block* other : {block->before, block->after}) {
      if (!other || other->allocated || !other->mapped || !is_free(card, other)) continue;
      out_of_pool(card, other);
      absorb(block, other);
    }
    into_pool(card, block);
  }
  static bool is_free(Card& card, Block* block) { return card.pools[block->small].count(block) > 0; }

  void release_cached(Card& card) {
    collect(card, true);
    for (Pool& pool : card.pools) {
      std::vector<Block*> free_blocks(pool.begin(), pool.end());
      for (Block* block : free_blocks) {
        if (expandable_segments) unmap_pages(card, block);
        else if (!block->is_split()) {
          out_of_pool(card, block);
          munmap(block->address, block->size);
          reserve(card, block, -static_cast<int64_t>(block->size));
          count(card.stats.segment, block, -1);
          delete block;
        }
      }
    }
  }
  // Gives back the whole pages inside a free block of an expandable segment.
  static void unmap_pages(Card& card, Block* block) {
    const size_t page = block->small ? kSmallSegment : kLargeSegment;
    Block* first = block;
    while (first->before) first = first->before;
    const size_t begin = round_up(block->address - first->address, page);
    const size_t end = (block->address + block->size - first->address) / page * page;
    if (end <= begin) return;
    out_of_pool(card, block);
    char* from = first->address + begin;
    Block* middle = block;
    if (from > block->address)
      cut(block, from - block->address, [&](Block* rest) { middle = rest; });
    cut(middle, end - begin, [&](Block* rest) { into_pool(card, rest); });
    if (middle != block) into_pool(card, block);
    madvise(middle->address, middle->size, MADV_DONTNEED);
    reserve(card, middle, -static_cast<int64_t>(middle->size));
    middle->mapped = false;
    for (Block* other : {middle->before, middle->after})
      if (other && !other->mapped) {
        card.unmapped[middle->small].erase(other);
        absorb(middle, other);
      }
    card.unmapped[middle->small].insert(middle);
  }

  [[noreturn]] static void out_of_memory(int device, size_t requested) {
    Card& card = cards[device];
    card.stats.num_ooms++;
    auto gib = [](size_t n) {
      std::ostringstream text;
      text.precision(2);
      text << std::fixed << (n >= kGiB ? double(n) / kGiB : double(n) / kMiB) << (n >= kGiB ? " GiB" : " MiB");
      return text.str();
    };
    const size_t allocated = card.stats.allocated_bytes[0].current, reserved = card.reserved();
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", gib(requested), ". GPU ", device,
        " has a total capacity of ", gib(card.total), " of which ",
        gib(card.total - std::min(card.total, card.context + reserved)), " is free",
        card.limit < card.total ? " and this process may use " + gib(card.limit) : "", ". Of the allocated memory ",
        gib(allocated), " is allocated by PyTorch, and ", gib(reserved - allocated),
        " is reserved by PyTorch but unallocated. (simulated card)");
    __builtin_unreachable();
  }
};
// Never destroyed: tensors may outlive everything else at the end of the process.
inline CardAllocator& allocator = *new CardAllocator();

inline void CardAllocator::free_address(void* address) {
  Lock lock(mutex);
  auto at = allocator.live_.find(static_cast<char*>(address));
  if (at != allocator.live_.end()) allocator.free_block(at->second);
}

} // namespace simcard
