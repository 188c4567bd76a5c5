// The simulated card's registration with torch, and what Python asks of it. One translation unit, because torch's
// headers take most of the time that it takes to compile. What the files hold:
//   streams.h    queues that may run late       block.h, allocator.h, pinned.h    memory
//   device.h     guard, hooks, generators       kernels.h, matmul.h, attention.h, fallback.h    operations
#include <torch/csrc/Generator.h>
#include <torch/csrc/utils/pybind.h>

#include "attention.h"
#include "fallback.h"

namespace simcard {

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Would be taken apart into smaller operations, which a card does not do.
  for (auto name : {"silu_backward", "native_layer_norm", "_fused_rms_norm", "mish_backward", "addr"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("is_set_to", TORCH_FN(at::native::is_set_to));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("resize_", TORCH_FN(resize_tensor));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("mm", TORCH_FN(matmul));
  m.impl("mm.out", TORCH_FN(matmul_out));
  m.impl("bmm", TORCH_FN(matmul));
  m.impl("bmm.out", TORCH_FN(matmul_out));
  m.impl("addmm", TORCH_FN(add_matmul));
  m.impl("baddbmm", TORCH_FN(add_matmul));
  m.impl("native_dropout", TORCH_FN(native_dropout));
  m.impl("_scaled_dot_product_efficient_attention", TORCH_FN(efficient_forward));
  m.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(efficient_backward));
  m.impl("_scaled_dot_product_flash_attention", TORCH_FN(flash_forward));
  m.impl("_scaled_dot_product_flash_attention_backward", TORCH_FN(flash_backward));
}

void install(int n) {
  TORCH_CHECK(n >= 1 && n <= kMaxDevices, "the simulated card has 1 to ", kMaxDevices, " devices, not ", n);
  n_devices = n;
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator, 100);
  static auto* guard = new CardGuard();
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(guard);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_kernel);
}

} // namespace simcard

// torch asks for the hooks by the name of their registry, once, at its own import.
using RegisteredCardHooks = simcard::CardHooks;
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", RegisteredCardHooks)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simcard;
  m.def("install", &install, "Makes torch believe in this many cards.");
  m.def("registered", [] { return at::detail::getCUDAHooks().hasCUDA(); });
  m.def("configure", [](int device, int64_t total, int64_t context, int major, int minor) {
    cards[device].total = total;
    cards[device].context = context;
    cards[device].major = major;
    cards[device].minor = minor;
  });
  m.def("behave", [](bool late, bool garbage, bool expandable) {
    synchronize_device(-1);
    allocator.emptyCache();
    late_streams = late;
    fill_with_garbage = garbage;
    expandable_segments = expandable;
  });
  m.def("compute_up_to", [](int64_t n_bytes) { computed_bytes = n_bytes < 0 ? kEverything : n_bytes; });
  m.def("computed_bytes", [] { return computed_bytes; });
  m.def("set_limit", [](int device, int64_t n_bytes) { cards[device].limit = n_bytes; });
  m.def("get_limit", [](int device) { return std::min(cards[device].limit, cards[device].total); });
  m.def("fail_after", [](int device, int64_t n) { cards[device].fail_after = n; });
  m.def("n_unordered_copies", [] { return n_unordered_copies; });
  m.def("pinned_bytes", [] { return pinned.reserved(); });
  m.def("limit_pinned", [](int64_t n_bytes) { pinned.limit = n_bytes < 0 ? SIZE_MAX : n_bytes; });
  m.def("current_device", [] { return current_device; });
  m.def("set_device", &set_device);
  m.def("exchange_device", &exchange_device);
  m.def("current_stream", [](int device) { return current_stream[device]; });
  m.def("set_stream", [](int device, int64_t stream) { current_stream[device] = stream; set_device(device); });
  m.def("synchronize", &synchronize_device);
  m.def("run_current_stream", [](int device) { run_until(here(device), kEverything); });
  m.def("default_generator", [](int device) { return default_generator(device); });
  m.def("resize_storage", &resize_storage);
  m.def("forget_workspaces", [] { workspaces.clear(); });
  m.def("chosen_kernels", [] {
    return std::map<std::string, int64_t>{
        {"flash", chosen.flash}, {"efficient", chosen.efficient}, {"math", chosen.math}};
  });
}
