// Page-locked host memory: sizes are rounded up to a power of two and freed blocks are kept for the next request, as
// torch's caching host allocator does (c10/core/CachingHostAllocator.h). A block is not handed out again while a copy
// from or to it may still be queued.
#pragma once

#include <c10/util/llvmMathExtras.h>

#include "allocator.h"

namespace simcard {

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    Lock lock(mutex);
    if (n == 0) return {nullptr, c10::Device(c10::kCPU)};
    const size_t size = c10::llvm::PowerOf2Ceil(n);
    char* address = nullptr;
    auto& free_blocks = free_[size];
    if (!free_blocks.empty() && !anything_queued()) {
      address = free_blocks.back();
      free_blocks.pop_back();
    } else {
      TORCH_CHECK(reserved_ + size <= limit, "CUDA error: out of memory (simulated card, pinned memory: ", size,
                  " bytes requested, ", reserved_, " of ", limit, " taken)");
      address = map_memory(size);
      reserved_ += size;
    }
    sizes_[address] = size;
    if (fill_with_garbage && static_cast<int64_t>(n) <= computed_bytes) std::memset(address, 0xFF, n);
    return {address, address, &PinnedAllocator::free_address, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedAllocator::free_address; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }

  bool owns(const void* pointer) const {
    Lock lock(mutex);
    char* address = static_cast<char*>(const_cast<void*>(pointer));
    auto at = sizes_.upper_bound(address);
    if (at == sizes_.begin()) return false;
    --at;
    return address < at->first + at->second;
  }
  size_t reserved() const { return reserved_; }
  size_t limit = SIZE_MAX;

 private:
  std::map<char*, size_t> sizes_; // of the blocks in use
  std::map<size_t, std::vector<char*>> free_;
  size_t reserved_ = 0;

  static void free_address(void* address);
};
inline PinnedAllocator& pinned = *new PinnedAllocator();

inline void PinnedAllocator::free_address(void* address) {
  Lock lock(mutex);
  auto at = pinned.sizes_.find(static_cast<char*>(address));
  if (at == pinned.sizes_.end()) return;
  pinned.free_[at->second].push_back(at->first);
  pinned.sizes_.erase(at);
}

} // namespace simcard
