// What the pointwise family is in torch whatever the device: its ops' arguments, checks and results. A device adds
//
//   static void forward(Pointwise, const PointwiseInputs&, int64_t reduction, Tensor& loss, Tensor* grad);
//   static void backward(Pointwise, const PointwiseInputs&, const Tensor& upstream, int64_t reduction, Tensor& grad);
//
// where a null grad is not wanted; in forward it is made for an upstream gradient of 1.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common.h"

namespace fusedloss {

// The checked arguments of an op as dense tensors of one order. Under torch.compile they may arrive in any layout.
struct PointwiseInputs {
  Tensor input, target;
  OptionalTensor weight;
  Params params;

  PointwiseInputs(Pointwise loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                  Params params);
  void fill(PointwiseArgs& args) const;
  double divisor(int64_t reduction) const { return reduction == kMean ? double(input.numel()) : 1.0; }

 private:
  void align(Tensor& other, const char* what, const char* name) const;
};

void check_backward(Pointwise loss, const PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction);

template <class Device, Pointwise kLoss>
struct PointwiseOps {
  static Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        Params params) {
    const PointwiseInputs inputs(kLoss, input, target, weight, params);
    Tensor loss = reduction == kNone ? at::empty_like(inputs.input) : at::empty({}, inputs.input.options());
    Device::forward(kLoss, inputs, reduction, loss, nullptr);
    return loss;
  }

  static std::tuple<Tensor, Tensor> with_grad(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                              int64_t reduction, Params params) {
    const PointwiseInputs inputs(kLoss, input, target, weight, params);
    check_gradient_in_forward(name_of(kLoss), input, reduction);
    Tensor loss = at::empty({}, inputs.input.options()), grad = empty_gradient(inputs.input);
    Device::forward(kLoss, inputs, reduction, loss, &grad);
    return {loss, grad};
  }

  static Tensor backward(const Tensor& upstream, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, int64_t reduction, Params params) {
    const PointwiseInputs inputs(kLoss, input, target, weight, params);
    check_backward(kLoss, inputs, upstream, reduction);
    Tensor grad = empty_gradient(inputs.input);
    Device::backward(kLoss, inputs, upstream, reduction, grad);
    return grad;
  }
};

// Puts a device behind every op of the family.
template <class Device>
void implement_pointwise(torch::Library& m) {
#define FUSEDLOSS_IMPLEMENT(name, Functor)                                       \
  m.impl(#name, &PointwiseOps<Device, Pointwise::name>::forward);                \
  m.impl(#name "_with_grad", &PointwiseOps<Device, Pointwise::name>::with_grad); \
  m.impl(#name "_backward", &PointwiseOps<Device, Pointwise::name>::backward);
  FUSEDLOSS_POINTWISE(FUSEDLOSS_IMPLEMENT)
#undef FUSEDLOSS_IMPLEMENT
}

}  // namespace fusedloss
