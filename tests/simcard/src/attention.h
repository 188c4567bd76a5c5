// Scaled dot-product attention: which kernel torch would choose on a card of this capability, and what that kernel
// allocates. After ATen/native/transformers/cuda/sdp_utils.cpp and attention.cu of torch 2.13. The numbers are those
// of the CPU's blockwise kernel in fp32. Not modelled: cuDNN's kernel (sm_90 and newer), dropout inside the kernel, nested tensors.
#pragma once

#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>

#include "matmul.h"

namespace simcard {

struct ChosenKernels {
  int64_t flash = 0, efficient = 0, math = 0;
};
inline ChosenKernels chosen;

inline bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

inline int64_t choose_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                             double dropout, bool causal, std::optional<double>, bool gqa) {
  const Card& card = cards[q.get_device()];
  auto& settings = at::globalContext();
  const bool ampere = card.major >= 8;
  const int64_t dim = q.size(-1);
  const bool usable = q.dim() == 4 && q.size(2) > 0 && k.size(2) > 0 && q.size(0) == k.size(0) && q.stride(-1) == 1 &&
      k.stride(-1) == 1 && v.stride(-1) == 1 && q.scalar_type() == k.scalar_type();
  const bool same_heads = q.size(1) == k.size(1) && q.size(1) == v.size(1);
  const bool shares_heads = gqa && q.size(1) % k.size(1) == 0 && k.size(1) == v.size(1);
  Lock lock(mutex);
  if (usable && settings.userEnabledFlashSDP() && ampere && is_half(q) && !mask && dim <= 256 && dim == k.size(-1) &&
      dim == v.size(-1) && (!causal || q.size(2) == k.size(2)) && (same_heads || shares_heads)) {
    ++chosen.flash;
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  }
  const int64_t alignment = is_half(q) ? 8 : ampere ? 4 : 1;
  const bool dtype_ok = ampere || q.scalar_type() != at::kBFloat16;
  if (usable && settings.userEnabledMemEfficientSDP() && dtype_ok && same_heads && dim == k.size(-1) &&
      dim == v.size(-1) && dim % alignment == 0) {
    ++chosen.efficient;
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  }
  TORCH_CHECK(settings.userEnabledMathSDP(), "No available kernel. Aborting execution.");
  ++chosen.math;
  return static_cast<int64_t>(at::SDPBackend::math);
}

// Inputs in fp32 on the CPU, one key head for each query head, the mask as numbers to add.
struct Inputs {
  Tensor q, k, v, bias;
  int64_t n_groups;
  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask)
      : n_groups(query.size(1) / key.size(1)) {
    auto repeated = [&](const Tensor& t) { return n_groups == 1 ? t : t.repeat_interleave(n_groups, 1); };
    q = wide(query), k = repeated(wide(key)), v = repeated(wide(value));
    if (!mask.defined()) return;
    bias = mask.is_cuda() ? cpu_alias(mask) : mask;
    if (bias.scalar_type() == at::kBool)
      bias = at::zeros(bias.sizes(), at::kFloat).masked_fill_(bias.logical_not(), -INFINITY);
    else bias = bias.to(at::kFloat);
  }
  std::optional<Tensor> added() const { return bias.defined() ? std::optional<Tensor>(bias) : std::nullopt; }
  // The gradient of a key head is the sum over the query heads that share it.
  Tensor summed(const Tensor& t) const { return n_groups == 1 ? t : t.unflatten(1, {-1, n_groups}).sum(2); }
};

inline void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, bool causal,
                   std::optional<double> scale, const Tensor& out, const Tensor& logsumexp) {
  begin(q.get_device());
  if (!computed(q)) return;
  at::AutoDispatchBelowADInplaceOrView guard;
  Inputs in(q, k, v, bias);
  auto [result, sums] =
      at::_scaled_dot_product_flash_attention_for_cpu(in.q, in.k, in.v, 0.0, causal, in.added(), scale);
  if (logsumexp.numel()) cpu_alias(logsumexp).zero_().narrow(2, 0, q.size(2)).copy_(sums);
  cpu_alias(out).copy_(result);
  end(q.get_device(), {q, k, v, bias}, {out, logsumexp});
}

inline void attend_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                            bool causal, std::optional<double> scale, const Tensor& dq, const Tensor& dk,
                            const Tensor& dv) {
  begin(q.get_device());
  if (!computed(q)) return;
  at::AutoDispatchBelowADInplaceOrView guard;
  Inputs in(q, k, v, bias);
  auto [out, sums] =
      at::_scaled_dot_product_flash_attention_for_cpu(in.q, in.k, in.v, 0.0, causal, in.added(), scale);
  auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      wide(grad), in.q, in.k, in.v, out, sums, 0.0, causal, in.added(), scale);
  cpu_alias(dq).copy_(gq);
  cpu_alias(dk).copy_(in.summed(gk));
  cpu_alias(dv).copy_(in.summed(gv));
  end(q.get_device(), {grad, q, k, v, bias}, {dq, dk, dv});
}

// The kernels lay their results out as (batch, seq, heads, dim).
inline Tensor by_rows(const Tensor& t, int64_t heads, int64_t dim) {
  return empty_on_card(t.get_device(), {t.size(0), t.size(2), heads, dim}, t.scalar_type()).transpose(1, 2);
}
inline Tensor floats(const Tensor& q, std::vector<int64_t> size) {
  return empty_on_card(q.get_device(), size, at::kFloat);
}
inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, bool need_logsumexp,
    double dropout, bool causal, std::optional<double> scale) {
  TORCH_CHECK(dropout == 0, "the simulated card has no dropout inside attention");
  check_device(q.get_device(), {q, k, v});
  Tensor out = by_rows(q, q.size(1), v.size(3));
  Tensor logsumexp = floats(q, {q.size(0), q.size(1), need_logsumexp ? padded(q.size(2), 32) : 0});
  attend(q, k, v, bias.value_or(Tensor()), causal, scale, out, logsumexp);
  Tensor seed = at::zeros({}, at::kLong), offset = at::zeros({}, at::kLong);
  return {out, logsumexp, seed, offset};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out,
    const Tensor& logsumexp, const Tensor&, const Tensor&, double, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  if (!grad.defined()) return {};
  check_device(q.get_device(), {grad, q, k, v});
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), dim = v.size(3);
  Tensor dq = by_rows(q, heads, q.size(3)), dk = by_rows(k, heads, k.size(3)), dv = by_rows(v, heads, dim);
  Tensor delta = floats(q, {batch, heads, padded(rows, 32)});
  Tensor sums; // gradients of 16-bit numbers are added up in fp32
  if (is_half(q)) sums = floats(q, {batch * heads * padded(rows, 64) * padded(dim, 64)});
  attend_backward(grad, q, k, v, bias, causal, scale, dq, dk, dv);
  return {dq, dk, dv, Tensor()};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool, std::optional<double> scale) {
  TORCH_CHECK(dropout == 0, "the simulated card has no dropout inside attention");
  check_device(q.get_device(), {q, k, v});
  Tensor out = by_rows(q, q.size(1), v.size(3)), logsumexp = floats(q, {q.size(0), q.size(1), q.size(2)});
  attend(q, k, v, Tensor(), causal, scale, out, logsumexp);
  Tensor state = empty_on_card(q.get_device(), {2}, at::kLong), unused = empty_on_card(q.get_device(), {0}, at::kLong);
  Tensor debug = empty_on_card(q.get_device(), {0}, q.scalar_type());
  return {out, logsumexp, Tensor(), Tensor(), q.size(2), k.size(2), state, unused, debug};
}

inline std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
    const Tensor&, const Tensor&, int64_t, int64_t, double, bool causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  if (!grad.defined()) return {};
  check_device(q.get_device(), {grad, q, k, v});
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(3), rows = padded(q.size(2), 128);
  Tensor dq = by_rows(q, heads, dim), dk = by_rows(k, k.size(1), dim), dv = by_rows(v, v.size(1), dim);
  Tensor delta = floats(q, {batch, heads, rows});
  Tensor sums = floats(q, {batch, heads, rows, padded(dim, dim <= 128 ? 32 : 64)});
  Tensor expanded_k, expanded_v; // each query head adds to keys of its own first
  if (k.size(1) != heads) {
    expanded_k = by_rows(k, heads, dim);
    expanded_v = by_rows(v, heads, dim);
  }
  attend_backward(grad, q, k, v, Tensor(), causal, scale, dq, dk, dv);
  return {dq, dk, dv};
}

} // namespace simcard
