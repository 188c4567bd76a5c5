// Tensors of the card: making, viewing, resizing and copying them. Everything else goes to the CPU's kernels
// (fallback.h), which see the same bytes through an alias.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>

#include "device.h"

namespace simcard {

using at::Tensor;

inline bool is_index(const Tensor& t) { return t.scalar_type() == at::kLong || t.scalar_type() == at::kBool; }
inline bool computed(const Tensor& t) {
  return static_cast<int64_t>(t.nbytes()) <= (is_index(t) ? computed_index_bytes() : computed_bytes);
}

// A CPU tensor over the bytes of a card's tensor; owns nothing.
inline Tensor cpu_alias(const Tensor& t) {
  c10::DataPtr bytes(const_cast<void*>(t.storage().data()), at::Device(at::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(bytes), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return alias;
}

inline Tensor empty_on_card(
    int device, at::IntArrayRef size, at::ScalarType dtype, std::optional<at::MemoryFormat> format = {}) {
  c10::DeviceGuard guard(card_device(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype, format);
}
inline Tensor empty_on_card(int device, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  c10::DeviceGuard guard(card_device(device));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype);
}

// Order between streams: see streams.h. Only late streams pay for it.
inline bool is_ordered(const Tensor& t, StreamKey reader) {
  if (!late_streams || !t.has_storage()) return true;
  Lock lock(mutex);
  const Block* block = allocator.find(t.storage().data());
  return !block || block->writer.first < 0 || precedes(block->writer, block->written, reader);
}
inline void mark_written(const Tensor& t, StreamKey writer) {
  if (!late_streams || !t.has_storage()) return;
  Lock lock(mutex);
  if (Block* block = allocator.find(t.storage().data())) {
    block->writer = writer;
    block->written = queues[writer].position;
  }
}

inline int checked_device(std::optional<at::Device> device) {
  const int index = index_of(at::device_or_default(device));
  TORCH_CHECK(index < n_devices, "CUDA error: invalid device ordinal (simulated card: ", n_devices, " devices)");
  return index;
}
inline Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return empty_on_card(checked_device(device), size, at::dtype_or_default(dtype), format);
}
inline Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  return empty_on_card(checked_device(device), size, stride, at::dtype_or_default(dtype));
}

// A storage that grows takes its new memory from its own allocator; what is queued for the old one runs first, and
// the garbage of the new one must not be queued, since its bytes are copied at once.
inline const Tensor& resize_tensor(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  Lock lock(mutex);
  c10::DeviceGuard guard(self.device());
  run_until(here(self.device().index()), kEverything);
  const size_t before = self.storage().nbytes();
  const bool fill = std::exchange(fill_with_garbage, false);
  at::native::resize_(self, size, format);
  fill_with_garbage = fill;
  const size_t after = self.storage().nbytes();
  if (fill && after > before && computed(self))
    std::memset(static_cast<char*>(self.storage().mutable_data()) + before, 0xFF, after - before);
  return self;
}
// The same for a storage, which may shrink, to nothing as well; `over` is any tensor that has it.
inline void resize_storage(const Tensor& over, int64_t n_bytes) {
  Lock lock(mutex);
  c10::DeviceGuard guard(over.device());
  run_until(here(over.device().index()), kEverything);
  auto* storage = over.storage().unsafeGetStorageImpl();
  const size_t kept = std::min(storage->nbytes(), static_cast<size_t>(n_bytes));
  const bool fill = std::exchange(fill_with_garbage, false);
  at::DataPtr data = n_bytes ? allocator.allocate(n_bytes) : at::DataPtr(nullptr, over.device());
  fill_with_garbage = fill;
  const bool is_computed = n_bytes <= computed_bytes;
  if (kept && is_computed) std::memcpy(data.get(), storage->data(), kept);
  if (fill && is_computed && static_cast<size_t>(n_bytes) > kept)
    std::memset(static_cast<char*>(data.get()) + kept, 0xFF, n_bytes - kept);
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(static_cast<size_t>(n_bytes));
}
inline Tensor& set_storage(
    Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}
inline Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t n = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {n}, {1});
}
inline Tensor& set_nothing(Tensor& self) {
  return set_whole_storage(self, empty_on_card(self.get_device(), {0}, self.scalar_type()).storage());
}

// A copy of equal layouts is a job of the current stream; one that converts runs at once, through a temporary tensor
// on the card if it crosses the bus, as on a card. Host memory that is not pinned is copied before this returns.
inline Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.numel() == 0 || self.is_same(source) || self.is_meta() || source.is_meta()) return self;
  const bool crosses = !self.is_cuda() || !source.is_cuda();
  const int device = self.is_cuda() && !source.is_cuda() ? self.get_device() : source.get_device();
  const StreamKey stream = here(device);
  if (!crosses && self.get_device() != source.get_device()) { // both devices' streams wait for each other
    Event ready;
    ready.record(here(self.get_device()));
    ready.block(stream);
    run_until(stream, kEverything);
    non_blocking = false;
  }
  Tensor to = self.is_cuda() ? cpu_alias(self) : self, from = source.is_cuda() ? cpu_alias(source) : source;
  const bool same_layout = to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() &&
      to.is_contiguous() && from.is_contiguous();
  Tensor temporary;
  if (crosses && !same_layout && !(to.scalar_type() == from.scalar_type() && to.strides() == from.strides()))
    temporary = empty_on_card(device, to.sizes(), from.scalar_type());
  if (!computed(self) || !computed(source)) return self;
  const bool ordered = !source.is_cuda() || is_ordered(source, stream);
  if (!ordered) ++n_unordered_copies;
  if (same_layout) {
    void* into = to.mutable_data_ptr();
    const void* out_of = from.const_data_ptr();
    const size_t n = to.nbytes();
    enqueue(stream, [=] { ordered ? std::memmove(into, out_of, n) : std::memset(into, 0xFF, n); });
  } else {
    run_until(stream, kEverything);
    at::AutoDispatchBelowADInplaceOrView guard;
    to.copy_(from);
    advance(stream);
  }
  if (self.is_cuda()) mark_written(self, stream);
  const void* host = !self.is_cuda() ? to.const_data_ptr() : !source.is_cuda() ? from.const_data_ptr() : nullptr;
  if (crosses && !(non_blocking && pinned.owns(host))) synchronize(stream);
  if (!crosses && self.get_device() != source.get_device()) {
    run_until(stream, kEverything);
    Event done;
    done.record(stream);
    done.block(here(self.get_device()));
  }
  return self;
}
inline Tensor copy_from(const Tensor& self, const Tensor& into, bool non_blocking) {
  Tensor to = into;
  return copy(to, self, non_blocking);
}
inline void record_stream(Tensor& self, c10::Stream stream) {
  allocator.recordStream(self.storage().data_ptr(), stream);
}

} // namespace simcard
