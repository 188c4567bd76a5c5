// Matrix products and dropout. Products of 16-bit numbers are added up in fp32 and rounded once, as the card does;
// the first product of a stream takes cuBLAS' workspace from the allocator.
#pragma once

#include "kernels.h"

namespace simcard {

// CUBLAS_WORKSPACE_CONFIG's default before sm_90: two buffers of 4096 KiB and eight of 16 KiB.
constexpr int64_t kCublasWorkspace = (2 * 4096 + 8 * 16) * 1024;
inline std::map<StreamKey, Tensor>& workspaces = *new std::map<StreamKey, Tensor>();

// The inputs of an operation lie on one device.
inline void check_device(int device, at::ArrayRef<Tensor> inputs) {
  for (const Tensor& t : inputs)
    TORCH_CHECK(!t.defined() || t.dim() == 0 || t.device() == card_device(device),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:", device, " and ",
                t.device(), "! (simulated card)");
}
// Before the operation runs on the current stream, and after its results have got their memory, whose filling with
// garbage is queued there.
inline void begin(int device) {
  const StreamKey stream = here(device);
  run_until(stream, kEverything);
  advance(stream);
}
// After it: the result is written, or spoilt where an input was not waited for.
inline void end(int device, at::ArrayRef<Tensor> inputs, at::ArrayRef<Tensor> results) {
  if (!late_streams) return;
  bool ordered = true;
  for (const Tensor& t : inputs) ordered = ordered && (!t.defined() || !t.is_cuda() || is_ordered(t, here(device)));
  for (const Tensor& t : results) {
    if (!t.defined()) continue;
    if (!ordered && t.numel()) std::memset(t.storage().mutable_data(), 0xFF, t.storage().nbytes());
    mark_written(t, here(device));
  }
}
inline void take_workspace(int device) {
  Lock lock(mutex);
  Tensor& workspace = workspaces[here(device)];
  if (!workspace.defined()) workspace = empty_on_card(device, {kCublasWorkspace}, at::kByte);
}

inline Tensor wide(const Tensor& t) { return cpu_alias(t).to(at::kFloat); }

// into = beta * base + alpha * a @ b, for matrices or batches of them.
inline Tensor& product(const Tensor* base, const Tensor& a, const Tensor& b, const at::Scalar& beta,
                       const at::Scalar& alpha, Tensor& into) {
  const int device = a.get_device();
  check_device(device, {a, b});
  take_workspace(device);
  begin(device);
  const bool half = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "expected mat1 and mat2 to have the same dtype, but got: ",
              a.dtype(), " != ", b.dtype());
  TORCH_CHECK(a.size(-1) == b.size(-2), "mat1 and mat2 shapes cannot be multiplied (", a.sizes(), " and ", b.sizes(), ")");
  if (!computed(a) || !computed(b) || !computed(into)) {
    if (computed(into)) cpu_alias(into).fill_(1);
    return into;
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  Tensor left = half ? wide(a) : cpu_alias(a), right = half ? wide(b) : cpu_alias(b);
  Tensor out = left.dim() == 2 ? at::mm(left, right) : at::bmm(left, right);
  if (!alpha.equal(1)) out.mul_(alpha);
  if (base && !beta.equal(0)) {
    Tensor more = base->is_cuda() ? cpu_alias(*base) : *base;
    out.add_(half ? more.to(at::kFloat) : more, beta);
  }
  cpu_alias(into).copy_(out);
  end(device, base ? std::vector<Tensor>{a, b, *base} : std::vector<Tensor>{a, b}, {into});
  return into;
}
inline Tensor product_like(const Tensor& a, const Tensor& b) {
  return a.dim() == 2 ? empty_on_card(a.get_device(), {a.size(0), b.size(1)}, a.scalar_type())
                      : empty_on_card(a.get_device(), {a.size(0), a.size(1), b.size(2)}, a.scalar_type());
}
inline Tensor matmul(const Tensor& a, const Tensor& b) {
  Tensor into = product_like(a, b);
  return product(nullptr, a, b, 0, 1, into);
}
inline Tensor& matmul_out(const Tensor& a, const Tensor& b, Tensor& into) {
  resize_tensor(into, product_like(a, b).sizes(), std::nullopt);
  return product(nullptr, a, b, 0, 1, into);
}
inline Tensor add_matmul(
    const Tensor& base, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  Tensor into = product_like(a, b);
  return product(&base, a, b, beta, alpha, into);
}

inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  const int device = input.get_device();
  Tensor out = empty_on_card(device, input.sizes(), input.scalar_type());
  Tensor mask = empty_on_card(device, input.sizes(), at::kBool);
  begin(device);
  if (!computed(input)) return {out, mask};
  at::AutoDispatchBelowADInplaceOrView guard;
  Tensor keep = cpu_alias(mask);
  if (!train.value_or(true)) p = 0;
  keep.bernoulli_(1 - p, engine(device));
  const double scale = p == 1 ? 0 : 1 / (1 - p);
  cpu_alias(out).copy_(cpu_alias(input).mul(keep).mul_(scale));
  end(device, {input}, {out, mask});
  return {out, mask};
}

} // namespace simcard
