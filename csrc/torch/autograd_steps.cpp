#include "autograd_steps.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <cmath>
#include <utility>

namespace fusedloss {

bool needs_formula(std::initializer_list<OptionalTensor> tensors) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet kWrapped({Key::Batched, Key::FuncTorchBatched, Key::FuncTorchGradWrapper});
  for (const Key mode : {Key::FuncTorchDynamicLayerFrontMode, Key::FuncTorchDynamicLayerBackMode}) {
    if (c10::impl::tls_is_dispatch_key_included(mode)) return true;
  }
  for (const OptionalTensor& tensor : tensors) {
    if (tensor && tensor->defined() && (tensor->key_set().has_any(kWrapped) || tensor->_fw_grad(0).defined()))
      return true;
  }
  return false;
}

void refuse_derivatives(torch::Library& m, const std::string& op) {
  m.impl(base_name(op).c_str(), torch::autograd::autogradNotImplementedFallback());
}

bool may_make_gradient_in_forward(const Tensor& input, int64_t reduction) {
  return reduction != kNone && input.scalar_type() != at::kHalf;
}

void check_gradient_in_forward(const char* name, const Tensor& input, int64_t reduction) {
  TORCH_CHECK(reduction != kNone, name, ": expected a reduction, mean or sum, for a gradient in forward, got none");
  TORCH_CHECK(may_make_gradient_in_forward(input, reduction), name, ": no gradient in forward in ", at::kHalf);
}

bool under_saved_tensor_hooks() { return !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

bool recorded() {
  using namespace c10::impl;
  return tls_is_dispatch_key_included(c10::DispatchKey::Python) &&
         TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::PROXY).has_value() &&
         !TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::FUNCTIONAL).has_value();
}

bool gradient_in_forward_pays(const Tensor& input, int64_t reduction) {
  return may_make_gradient_in_forward(input, reduction) && !under_saved_tensor_hooks() && !recorded();
}

bool is_traced(const Tensor& upstream) {
  constexpr c10::DispatchKeySet kTraced({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return upstream.key_set().has_any(kTraced) || recorded();
}

GradientOfForward take_gradient(Kept& kept, const Tensor& upstream) {
  if (!kept.of_forward.made || !upstream.defined() || is_traced(upstream)) return {};
  return {true, std::exchange(kept.of_forward.left, Tensor())};
}

Tensor scaled(const Tensor& left, const Tensor& upstream) {
  return scale_(left.use_count() == 1 ? left : left.clone(), upstream);
}

// On a GPU nobody asks: reading the upstream gradient would wait for it.
bool scales_exactly(const Tensor& input, const Tensor& upstream) {
  if (input.scalar_type() != at::kBFloat16 || !device_for(input).host_reads) return true;
  int exponent;
  return std::abs(std::frexp(at::_local_scalar_dense(upstream).toDouble(), &exponent)) == 0.5;
}

variable_list differentiable_gradients(const std::string& op, const variable_list& inputs,
                                       const variable_list& upstreams,
                                       const std::function<variable_list(const variable_list&)>& formula) {
  TORCH_CHECK(formula, op, ": no native formula to differentiate twice");
  const bool create_graph = at::GradMode::is_enabled();  // or else the upstream gradient asks for the formula
  const at::AutoGradMode enabled(true);
  variable_list views, wanted;
  for (const Tensor& input : inputs) {
    views.push_back(input.view_as(input));
    if (views.back().requires_grad()) wanted.push_back(views.back());
  }
  const variable_list found = torch::autograd::grad(formula(views), wanted, upstreams, true, create_graph, true);
  variable_list gradients(inputs.size());
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (views[i].requires_grad()) gradients[i] = found[next++];
  }
  return gradients;
}

}  // namespace fusedloss
