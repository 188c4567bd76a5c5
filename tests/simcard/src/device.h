// What torch asks of a device type: the current device and stream (device guard), whether CUDA is there and which
// allocators and random generators it has (hooks). Random numbers of the card come from a generator of its own, whose
// engine is the CPU's: seeds and states behave as on a card, the numbers are not a card's.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "pinned.h"

namespace simcard {

inline c10::Device card_device(int index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}
inline int index_of(c10::Device device) { return device.index() < 0 ? current_device : device.index(); }
inline void set_device(int index) {
  TORCH_CHECK(index < n_devices, "CUDA error: invalid device ordinal (simulated card: ", n_devices, " devices)");
  if (index >= 0) current_device = index;
}
inline int exchange_device(int index) {
  const int old = current_device;
  set_device(index);
  return old;
}

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  static StreamKey key(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }
  static c10::Stream stream(int device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, card_device(device), id);
  }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device d) const override { return card_device(exchange_device(d.index())); }
  c10::Device getDevice() const override { return card_device(current_device); }
  void setDevice(c10::Device d) const override { set_device(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  c10::Stream getStream(c10::Device d) const override { return stream(index_of(d), current_stream[index_of(d)]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(index_of(d), 0); }
  c10::Stream getNewStream(c10::Device d, int = 0) const override {
    Lock lock(mutex);
    return stream(index_of(d), ++n_streams);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool = false) const override { return getNewStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(n_devices); }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event();
    static_cast<Event*>(*event)->record(key(s));
  }
  void block(void* event, const c10::Stream& s) const override {
    if (event) static_cast<Event*>(event)->block(key(s));
  }
  bool queryEvent(void* event) const override { return !event || static_cast<Event*>(event)->done(); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream& s) const override {
    Lock lock(mutex);
    return queues[key(s)].jobs.empty();
  }
  void synchronizeStream(const c10::Stream& s) const override { synchronize(key(s)); }
  void synchronizeEvent(void* event) const override {
    if (event) static_cast<Event*>(event)->wait_on_host();
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { synchronize_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& s) const override {
    allocator.recordStream(pointer, s);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.0; } // speed is not modelled
};

inline at::Generator& engine(int device) {
  static at::Generator engines[kMaxDevices];
  if (!engines[device].defined()) engines[device] = at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
  return engines[device];
}

// A generator that says `cuda:N` and passes everything on to an engine of the CPU.
struct CardGenerator final : public c10::GeneratorImpl {
  at::Generator cpu;
  CardGenerator(int device, at::Generator engine)
      : c10::GeneratorImpl(card_device(device), c10::DispatchKeySet(c10::DispatchKey::CUDA)), cpu(std::move(engine)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "the simulated card's generators have no offset"); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }

 private:
  CardGenerator* clone_impl() const override { return new CardGenerator(device().index(), cpu.clone()); }
};

inline at::Generator& default_generator(int device) {
  static at::Generator generators[kMaxDevices];
  if (!generators[device].defined()) generators[device] = at::make_generator<CardGenerator>(device, engine(device));
  return generators[device];
}

struct CardHooks final : at::CUDAHooksInterface {
  explicit CardHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(n_devices); }
  int getNumGPUs() const override { return n_devices; }
  c10::DeviceIndex current_device() const override { return static_cast<c10::DeviceIndex>(simcard::current_device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(c10::DeviceIndex d) const override { set_device(d); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return static_cast<c10::DeviceIndex>(exchange_device(d));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    Lock lock(mutex);
    const Block* block = allocator.find(pointer);
    return card_device(block ? block->device : simcard::current_device);
  }
  bool isPinnedPtr(const void* pointer) const override { return pinned.owns(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex d) const override {
    return default_generator(d < 0 ? simcard::current_device : d);
  }
  at::Generator getNewGenerator(c10::DeviceIndex d) const override {
    return at::make_generator<CardGenerator>(
        d < 0 ? simcard::current_device : d, at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val));
  }
  void deviceSynchronize(c10::DeviceIndex d) const override { synchronize_device(d); }
  std::string showConfig() const override { return "simulated card"; }
};

} // namespace simcard
