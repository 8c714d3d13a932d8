// What the softmax family is in torch whatever the device: its ops' arguments, checks and results. A device adds
//
//   static void forward(Softmax, const SoftmaxInputs&, int64_t reduction, SoftmaxResults&, Tensor* grad);
//   static void backward(Softmax, const SoftmaxInputs&, const Tensor& upstream, const OptionalTensor& upstream_second,
//                        const Tensor& statistics, int64_t reduction, Tensor& grad);
//
// where grad has a layout of its own and may be the logits. A null one is not wanted; in forward it is made for an
// upstream gradient of 1.
#pragma once

#include <torch/library.h>

#include <tuple>

#include "common.h"

namespace fusedloss {

// What a loss is whatever its parameters.
struct SoftmaxTraits {
  bool (*valid)(const double* params);
  bool mean_by_weight, soft, reads_row;
};
const SoftmaxTraits& traits_of(Softmax loss);

// How many numbers a row leaves to backward: max and rest, and what else the loss sums.
int64_t saved_statistics(Softmax loss, Params params);

// A call but for its logits.
struct SoftmaxCall {
  Tensor target;  // class indices, or probabilities in the shape of the logits
  OptionalTensor weight;
  int64_t reduction, ignore_index;
  Params params;
  bool wide = false;    // results in the arithmetic type of the logits: float32 of bfloat16 and float16
  bool second = false;  // a second result is wanted: lse, or the entropy of log_probs
};

// The autograd side, callable without the dispatcher: the loss, and the second result or an undefined tensor.
std::tuple<Tensor, Tensor> softmax_loss(Softmax loss, const Tensor& logits, const SoftmaxCall& call,
                                        std::optional<bool> grad_in_forward, bool in_place);

// Why the kernels do not own a call, tensors being plain ones on one device; null where they do.
const char* declines_softmax(Softmax loss, const Tensor& logits, const SoftmaxCall& call);

// The native formula gives the loss and, if asked, the second result.
using SoftmaxFormula = std::function<std::vector<Tensor>(const Tensor& logits, const SoftmaxCall&)>;
SoftmaxFormula& native_formula(Softmax loss);

// The layout of (C), (N, C) or (N, C, d1, ...), or none where the dimensions after C do not merge into one.
std::optional<SoftmaxLayout> layout_of(const Tensor& logits);

// The checked arguments of an op, as tensors that kernels can read.
struct SoftmaxInputs {
  Tensor logits, target, weight;  // of a layout: logits and probabilities; weight in arithmetic type or undefined
  std::vector<int64_t> row_sizes;
  int64_t ignore_index;
  Params params;
  bool wide, second;

  SoftmaxInputs(Softmax loss, const Tensor& logits, const SoftmaxCall& call);
  SoftmaxLayout layout() const { return *layout_of(logits); }
  at::TensorOptions result_options() const;
  void fill(SoftmaxArgs& args) const;
};

// The statistics are one tensor in arithmetic type: all rows' max, rest and what else
// saved_statistics counts, and last the divisor of a mean.
struct SoftmaxResults {
  Tensor loss, second, statistics;  // second is empty where it is not wanted

  SoftmaxResults(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction);
};

void check_with_grad(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction);
void check_backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                    const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction);

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
  using Result = std::tuple<Tensor, Tensor, Tensor>;

  static Result forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        int64_t ignore_index, Params params, bool wide, bool second) {
    const SoftmaxInputs inputs(kLoss, logits, {target, weight, reduction, ignore_index, params, wide, second});
    SoftmaxResults results(kLoss, inputs, reduction);
    Device::forward(kLoss, inputs, reduction, results, nullptr);
    return {results.loss, results.second, results.statistics};
  }

  static Result with_grad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                          int64_t ignore_index, Params params, bool wide) {
    const SoftmaxInputs inputs(kLoss, logits, {target, weight, reduction, ignore_index, params, wide});
    check_with_grad(kLoss, inputs, reduction);
    SoftmaxResults results(kLoss, inputs, reduction);
    Destination to = Destination::fresh(logits, inputs);
    Device::forward(kLoss, inputs, reduction, results, &to.writable);
    return {results.loss, results.statistics, to.finish()};
  }

  static std::tuple<Tensor, Tensor> with_grad_(Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                               int64_t reduction, int64_t ignore_index, Params params, bool wide) {
    const SoftmaxInputs inputs(kLoss, logits, {target, weight, reduction, ignore_index, params, wide});
    check_with_grad(kLoss, inputs, reduction);
    SoftmaxResults results(kLoss, inputs, reduction);
    Destination to(logits, inputs.logits);
    Device::forward(kLoss, inputs, reduction, results, &to.writable);
    to.finish();
    return {results.loss, results.statistics};
  }

  static void make_backward(Destination& to, const SoftmaxInputs& inputs, const Tensor& upstream,
                            const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction) {
    check_backward(kLoss, inputs, upstream, upstream_second, statistics, reduction);
    Device::backward(kLoss, inputs, upstream, upstream_second, statistics, reduction, to.writable);
    to.finish();
  }

  static Tensor backward(const Tensor& upstream, const OptionalTensor& upstream_second, const Tensor& logits,
                         const Tensor& target, const OptionalTensor& weight, const Tensor& statistics,
                         int64_t reduction, int64_t ignore_index, Params params) {
    const bool wide = upstream.scalar_type() != logits.scalar_type();
    const SoftmaxInputs inputs(kLoss, logits, {target, weight, reduction, ignore_index, params, wide});
    Destination to = Destination::fresh(logits, inputs);
    make_backward(to, inputs, upstream, upstream_second, statistics, reduction);
    return to.result;
  }

  static void backward_(const Tensor& upstream, const OptionalTensor& upstream_second, Tensor logits,
                        const Tensor& target, const OptionalTensor& weight, const Tensor& statistics, int64_t reduction,
                        int64_t ignore_index, Params params) {
    const bool wide = upstream.scalar_type() != logits.scalar_type();
    const SoftmaxInputs inputs(kLoss, logits, {target, weight, reduction, ignore_index, params, wide});
    Destination to(logits, inputs.logits);
    make_backward(to, inputs, upstream, upstream_second, statistics, reduction);
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
