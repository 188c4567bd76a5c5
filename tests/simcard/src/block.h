// A block of the card's memory, and what the card knows of itself.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <sys/mman.h>

#include <set>
#include <tuple>
#include <vector>

#include "streams.h"

namespace simcard {

using c10::CachingAllocator::Stat;
using c10::CachingAllocator::StatArray;

constexpr size_t kMiB = size_t(1) << 20, kGiB = size_t(1) << 30;

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

inline char* map_memory(size_t n) {
  void* address = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(address != MAP_FAILED, "the simulated card found no ", n, " bytes of address space");
  return static_cast<char*>(address);
}

struct Block {
  int device;
  int64_t stream;
  bool small;
  char* address;
  size_t size;
  size_t requested = 0;
  bool allocated = false;
  bool filled = false;                          // with garbage when it was taken, so also when it is freed
  bool mapped = true;                           // false: address space of an expandable segment without memory
  Block *before = nullptr, *after = nullptr;    // neighbours in the same segment
  std::set<int64_t> used_by;                    // other streams, by record_stream
  StreamKey writer{-1, 0};                      // who wrote last, and when
  int64_t written = 0;

  bool is_split() const { return before || after; }
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->stream, a->size, a->address) < std::tie(b->stream, b->size, b->address);
  }
};
using Pool = std::set<Block*, BySize>;

struct Card {
  size_t total = 11 * kGiB;
  size_t context = 512 * kMiB; // what the driver, kernels and libraries hold; assumed, as in onecard/model/memory.py
  size_t limit = SIZE_MAX;     // set_per_process_memory_fraction
  int major = 7, minor = 5;
  Pool pools[2], unmapped[2]; // [small]
  std::vector<std::pair<Block*, std::vector<std::pair<StreamKey, int64_t>>>> in_use; // freed, but a stream still reads
  c10::CachingDeviceAllocator::DeviceStats stats;
  int64_t fail_after = -1; // allocations that still succeed; -1: as many as fit

  size_t reserved() const { return stats.reserved_bytes[0].current; }
  size_t room() const { return std::min(limit, total - std::min(total, context)); }
};
inline Card cards[kMaxDevices];

inline void count(StatArray& stat, const Block* block, int64_t amount) {
  for (int kind : {0, block->small ? 1 : 2}) {
    if (amount >= 0) stat[kind].increase(amount);
    else stat[kind].decrease(-amount);
  }
}

} // namespace simcard
