#include "in_place.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <vector>

namespace fusedloss {

namespace {

using Stack = torch::jit::Stack;

// Calls f(argument, whether the op overwrites it) on every tensor that an op is given.
template <class F>
void for_each_tensor(const c10::OperatorHandle& op, Stack* stack, F f) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    at::IValue& value = stack->at(stack->size() - arguments.size() + i);
    const auto* alias = arguments[i].alias_info();
    if (value.isTensor() && value.toTensor().defined()) f(value, alias && alias->isWrite());
  }
}

void without_derivative(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  bool differentiates = false, has_tangent = false;
  for_each_tensor(op, stack, [&](const at::IValue& value, bool) {
    differentiates = differentiates || (at::GradMode::is_enabled() && value.toTensor().requires_grad());
    has_tangent = has_tangent || value.toTensor()._fw_grad(/*level=*/0).defined();
  });
  for_each_tensor(op, stack, [&](const at::IValue& value, bool written) {
    if (written) torch::autograd::check_inplace(value.toTensor(), differentiates);
  });
  TORCH_CHECK(!differentiates && !has_tangent, op.schema().name(),
              " has no derivative: expected tensors that require no gradient and have no tangent");
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void counted(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  std::vector<Tensor> overwritten;
  for_each_tensor(op, stack, [&](const at::IValue& value, bool written) {
    if (written) overwritten.push_back(value.toTensor());
  });
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const Tensor& tensor : overwritten) torch::autograd::increment_version(tensor);
}

void resolved(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  for_each_tensor(op, stack, [&](at::IValue& value, bool written) {
    const Tensor tensor = value.toTensor();
    TORCH_CHECK(!written || !tensor.is_neg(), op.schema().name(),
                ": expected a tensor to overwrite, got a negated view of one");
    value = tensor.resolve_neg();
  });
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), stack);
}

// From the first byte to the last, whatever storage the tensor has.
bool may_share_memory(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& tensor) {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size());
  };
  return a.device() == b.device() && a.const_data_ptr() < end(b) && b.const_data_ptr() < end(a);
}

}  // namespace

void refuse_derivatives_in_place(torch::Library& under_autograd, const std::string& name) {
  under_autograd.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
}

void count_changes(torch::Library& under_version_counter, const std::string& name) {
  under_version_counter.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&counted>());
}

void refuse_negated_views(torch::Library& under_negation, const std::string& name) {
  under_negation.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&resolved>());
}

void check_overwritten(const Tensor& written, std::initializer_list<const Tensor*> read) {
  at::assert_no_internal_overlap(written);
  for (const Tensor* tensor : read) {
    if (tensor && tensor->defined()) at::assert_no_overlap(written, *tensor);
  }
}

Tensor apart_from(const Tensor& written, const Tensor& read) {
  return read.defined() && may_share_memory(written, read) ? read.clone() : read;
}

}  // namespace fusedloss
