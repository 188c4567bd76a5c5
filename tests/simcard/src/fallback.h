// Every operation without a kernel of its own: its tensors are handed to the CPU's kernel as aliases of the card's
// bytes, and what it makes is put into new memory of the card. The temporary tensors of a kernel stay on the CPU and
// are not counted. Tensors on two devices are refused as on a card.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>

#include "kernels.h"

namespace simcard {

// The host waits for these, and they are computed even where others are shapes only.
inline const std::unordered_set<std::string> kValueDependent = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero"};
// These take tensors of the CPU beside the card's.
inline const std::unordered_set<std::string> kMixed = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};

struct Call {
  const c10::FunctionSchema& schema;
  int device = -1;
  bool compute = true;
  std::vector<std::pair<Tensor, Tensor>> aliases; // the card's tensor, the one the CPU's (or Meta's) kernel sees
  std::vector<std::pair<Tensor, Tensor>> resized; // empty outputs, which the kernel gives a size
  std::vector<Tensor> written;                    // the arguments that the operation changes

  explicit Call(const c10::FunctionSchema& s) : schema(s) {}

  template <class F>
  static void each_tensor(const c10::IValue& value, F visit) {
    if (value.isTensor()) visit(value.toTensor());
    else if (value.isTensorList()) for (const Tensor t : value.toTensorList()) visit(t);
    else if (value.isOptionalTensorList())
      for (const std::optional<Tensor> t : value.toOptionalTensorList()) if (t) visit(*t);
  }

  void find_device(const c10::IValue* arguments, size_t n) {
    int64_t bytes = 0;
    bool indices = true;
    std::optional<at::Device> first;
    for (size_t i = 0; i < n; ++i) {
      if (arguments[i].isDevice() && device < 0) device = index_of(arguments[i].toDevice());
      each_tensor(arguments[i], [&](const Tensor& t) {
        if (!t.defined()) return;
        if (t.is_cuda()) bytes += static_cast<int64_t>(t.nbytes()), indices = indices && is_index(t);
        if (t.dim() == 0 && !(t.is_cuda() && !first && device < 0)) return;
        if (!t.is_cuda() && (!t.is_cpu() || kMixed.count(schema.name()))) return;
        if (t.is_cuda() && (!first || first->is_cuda())) device = t.get_device();
        if (t.dim() == 0) return;
        if (!first) first = t.device();
        TORCH_CHECK(*first == t.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                    *first, " and ", t.device(), "! (simulated card, ", schema.name(), ")");
      });
    }
    if (device < 0) device = current_device;
    compute = bytes <= (indices ? computed_index_bytes() : computed_bytes) || kValueDependent.count(schema.name());
  }

  Tensor alias(const Tensor& t, bool is_output) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) return compute || !t.is_cpu() ? t : t.to(at::kMeta);
    for (auto& [card, other] : aliases) if (card.is_same(t)) return other;
    Tensor other;
    if (!compute) other = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
    else if (is_output && t.numel() == 0) {
      other = at::empty({0}, t.options().device(at::kCPU));
      resized.push_back({t, other});
    } else other = cpu_alias(t);
    aliases.push_back({t, other});
    return other;
  }

  // The same argument for the other kernel.
  c10::IValue translate(const c10::IValue& value, const c10::Argument& argument) {
    const bool is_output = argument.is_out();
    if (argument.alias_info() && argument.alias_info()->isWrite())
      each_tensor(value, [&](const Tensor& t) { if (t.defined() && t.is_cuda()) written.push_back(t); });
    if (value.isTensor()) return alias(value.toTensor(), is_output);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor t : value.toTensorList()) list.push_back(alias(t, is_output));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> t : value.toOptionalTensorList()) {
        if (!compute && t && t->scalar_type() == at::kBool) { // a shape that depends on the mask's values
          const Tensor where = (t->is_cuda() ? cpu_alias(*t) : *t).nonzero();
          for (const Tensor& column : where.unbind(1)) list.push_back(std::optional<Tensor>(column.to(at::kMeta)));
        } else list.push_back(t ? std::optional<Tensor>(alias(*t, is_output)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice()) return at::Device(compute ? at::kCPU : at::kMeta);
    if (argument.name() == "generator") {
      if (!compute) return c10::IValue();
      if (!value.isGenerator()) return engine(device);
      return static_cast<CardGenerator*>(value.toGenerator().unsafeGetGeneratorImpl())->cpu;
    }
    return value;
  }

  // A tensor that the kernel returned, on the card: one of the arguments, a view of one, or new.
  Tensor on_card(const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [card, other] : aliases) if (other.is_same(t)) return card;
    if (compute && t.numel() > 0)
      for (auto& [card, other] : aliases)
        if (other.has_storage() && other.storage().data() && other.storage().data() == t.storage().data()) {
          auto view = at::detail::make_tensor<c10::TensorImpl>(
              c10::TensorImpl::VIEW, c10::Storage(card.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA),
              t.dtype());
          view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
          return view;
        }
    Tensor card = empty_on_card(device, t.sizes(), t.strides(), t.scalar_type());
    run_until(here(device), kEverything);
    if (t.numel() == 0) return card;
    if (compute) cpu_alias(card).copy_(t);
    else neutral(card);
    return card;
  }
  c10::IValue on_card(const c10::IValue& value) {
    if (value.isTensor()) return on_card(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor t : value.toTensorList()) list.push_back(on_card(t));
    return list;
  }

  // In place of a result that was not computed: ones, so that a loss is finite; indices are zero.
  static void neutral(const Tensor& card) {
    if (!computed(card)) return;
    Tensor values = cpu_alias(card);
    at::isFloatingType(values.scalar_type()) ? values.fill_(1) : values.zero_();
  }
};

inline void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call(op.schema());
  const auto& arguments = call.schema.arguments();
  const size_t n = arguments.size(), begin = stack->size() - n;
  call.find_device(stack->data() + begin, n);
  const StreamKey stream = here(call.device);
  if (kValueDependent.count(call.schema.name())) synchronize(stream);
  else run_until(stream, kEverything);
  advance(stream);
  at::AutoDispatchBelowADInplaceOrView guard;
  bool ordered = true;
  for (size_t i = 0; i < n; ++i) {
    auto& value = (*stack)[begin + i];
    if (late_streams && call.compute)
      Call::each_tensor(value, [&](const Tensor& t) {
        if (t.defined() && t.is_cuda() && !is_ordered(t, stream)) ordered = false;
      });
    value = call.translate(value, arguments[i]);
  }
  op.redispatchBoxed(c10::DispatchKeySet(call.compute ? c10::DispatchKey::CPU : c10::DispatchKey::Meta), stack);
  for (auto& [card, other] : call.resized) {
    resize_tensor(card, other.sizes(), std::nullopt);
    run_until(stream, kEverything);
    if (other.numel()) cpu_alias(card).copy_(other);
  }
  const size_t n_returns = call.schema.returns().size();
  for (size_t i = stack->size() - n_returns; i < stack->size(); ++i) (*stack)[i] = call.on_card((*stack)[i]);
  if (!call.compute) { // what an operation changes in place keeps its values; an output had none
    const bool has_outputs = std::any_of(arguments.begin(), arguments.end(), [](const auto& a) { return a.is_out(); });
    if (has_outputs) for (const Tensor& card : call.written) Call::neutral(card);
    return;
  }
  if (!late_streams) return;
  auto finish = [&](const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return;
    if (!ordered && t.numel()) std::memset(t.storage().mutable_data(), 0xFF, t.storage().nbytes());
    mark_written(t, stream);
  };
  for (size_t i = stack->size() - n_returns; i < stack->size(); ++i) Call::each_tensor((*stack)[i], finish);
  for (const Tensor& t : call.written) finish(t);
}

} // namespace simcard
