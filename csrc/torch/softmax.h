// What the softmax family is in torch whatever the device: its ops' arguments, checks and results. A device adds
//
//   static void forward(Softmax, const SoftmaxInputs&, int64_t reduction,
//                       Tensor& loss, Tensor& statistics, Tensor* grad);
//   static void backward(Softmax, const SoftmaxInputs&, const Tensor& upstream, const Tensor& statistics,
//                        int64_t reduction, Tensor& grad);
//
// where grad has a layout of its own and may be the logits. A null one is not wanted; in forward it is made for an
// upstream gradient of 1.
#pragma once

#include <torch/library.h>

#include <tuple>

#include "common.h"

namespace fusedloss {

// The layout of (C), (N, C) or (N, C, d1, ...), or none where the dimensions after C do not merge into one.
std::optional<SoftmaxLayout> layout_of(const Tensor& logits);

// The checked arguments of an op, as tensors that kernels can read.
struct SoftmaxInputs {
  Tensor logits, target, weight;  // logits of a layout, weight in arithmetic type or undefined
  int64_t ignore_index;
  Params params;

  SoftmaxInputs(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                int64_t ignore_index, Params params);
  SoftmaxLayout layout() const { return *layout_of(logits); }
  void fill(SoftmaxArgs& args) const;
};

// The statistics are one tensor in arithmetic type: max and rest of every row, and last the divisor of a mean.
Tensor empty_statistics(const SoftmaxInputs& inputs);
Tensor empty_loss(const SoftmaxInputs& inputs, int64_t reduction);
void check_backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream, const Tensor& statistics,
                    int64_t reduction);

// Where a gradient goes: `result` itself, or where that has no layout, a dense tensor that is copied into it.
struct Destination {
  Tensor result, writable;

  Destination(const Tensor& result_, const Tensor& dense) : result(result_), writable(result_) {
    if (!layout_of(result)) writable = dense;
  }
  // A gradient of its own, in the order of the logits.
  static Destination fresh(const Tensor& logits, const SoftmaxInputs& inputs) {
    const Tensor grad = empty_gradient(logits);
    return {grad, layout_of(grad) ? grad : empty_gradient(inputs.logits)};
  }
  Tensor finish() const { return writable.is_same(result) ? result : result.copy_(writable); }
};

template <class Device, Softmax kLoss>
struct SoftmaxOps {
  static std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                            int64_t reduction, int64_t ignore_index, Params params) {
    const SoftmaxInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    Tensor loss = empty_loss(inputs, reduction), statistics = empty_statistics(inputs);
    Device::forward(kLoss, inputs, reduction, loss, statistics, nullptr);
    return {loss, statistics};
  }

  static std::tuple<Tensor, Tensor, Tensor> with_grad(const Tensor& logits, const Tensor& target,
                                                      const OptionalTensor& weight, int64_t reduction,
                                                      int64_t ignore_index, Params params) {
    const SoftmaxInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    check_gradient_in_forward(name_of(kLoss), logits, reduction);
    Tensor loss = empty_loss(inputs, reduction), statistics = empty_statistics(inputs);
    Destination to = Destination::fresh(logits, inputs);
    Device::forward(kLoss, inputs, reduction, loss, statistics, &to.writable);
    return {loss, statistics, to.finish()};
  }

  static std::tuple<Tensor, Tensor> with_grad_(Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                               int64_t reduction, int64_t ignore_index, Params params) {
    const SoftmaxInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    check_gradient_in_forward(name_of(kLoss), logits, reduction);
    Tensor loss = empty_loss(inputs, reduction), statistics = empty_statistics(inputs);
    Destination to(logits, inputs.logits);
    Device::forward(kLoss, inputs, reduction, loss, statistics, &to.writable);
    to.finish();
    return {loss, statistics};
  }

  static Tensor backward(const Tensor& upstream, const Tensor& logits, const Tensor& target,
                         const OptionalTensor& weight, const Tensor& statistics, int64_t reduction,
                         int64_t ignore_index, Params params) {
    const SoftmaxInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    check_backward(kLoss, inputs, upstream, statistics, reduction);
    Destination to = Destination::fresh(logits, inputs);
    Device::backward(kLoss, inputs, upstream, statistics, reduction, to.writable);
    return to.finish();
  }

  static void backward_(const Tensor& upstream, Tensor logits, const Tensor& target, const OptionalTensor& weight,
                        const Tensor& statistics, int64_t reduction, int64_t ignore_index, Params params) {
    const SoftmaxInputs inputs(kLoss, logits, target, weight, ignore_index, params);
    check_backward(kLoss, inputs, upstream, statistics, reduction);
    Destination to(logits, inputs.logits);
    Device::backward(kLoss, inputs, upstream, statistics, reduction, to.writable);
    to.finish();
  }
};

// Puts a device behind every op of the family.
template <class Device>
void implement_softmax(torch::Library& m) {
#define FUSEDLOSS_IMPLEMENT(name, Functor)                                     \
  m.impl(#name, &SoftmaxOps<Device, Softmax::name>::forward);                  \
  m.impl(#name "_with_grad", &SoftmaxOps<Device, Softmax::name>::with_grad);   \
  m.impl(#name "_with_grad_", &SoftmaxOps<Device, Softmax::name>::with_grad_); \
  m.impl(#name "_backward", &SoftmaxOps<Device, Softmax::name>::backward);     \
  m.impl(#name "_backward_", &SoftmaxOps<Device, Softmax::name>::backward_);
  FUSEDLOSS_SOFTMAX(FUSEDLOSS_IMPLEMENT)
#undef FUSEDLOSS_IMPLEMENT
}

}  // namespace fusedloss
