// What the softmax family is in torch whatever the device: its ops' arguments, checks and results. A device adds
//
//   static void forward(const SoftmaxLoss&, const SoftmaxInputs&, int64_t reduction, SoftmaxResults&, Tensor* grad);
//   static void backward(const SoftmaxLoss&, const SoftmaxInputs&, const Tensor& upstream,
//                        const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction,
//                        Tensor& grad);
//
// where grad has a layout of its own and may be the logits. A null one is not wanted; in forward it is made for an
// upstream gradient of 1.
#pragma once

#include <array>
#include <atomic>
#include <tuple>
#include <vector>

#include "../kernels/custom.h"
#include "carried.h"
#include "in_place.h"

namespace fusedloss {

// A call but for its logits.
struct SoftmaxCall {
  Tensor target;  // class indices, or probabilities in the shape of the logits
  OptionalTensor weight;
  int64_t reduction, ignore_index;
  Params params;
  bool wide = false;                  // results in the arithmetic type of the logits: float32 of bfloat16 and float16
  bool second = false;                // a second result is wanted: lse, or the entropy of log_probs
  OptionalTensor sample_weight = {};  // a factor of every row's loss
};

struct SoftmaxHandles;

struct SoftmaxLoss {
  std::string op;  // "fusedloss::cross_entropy"
  int64_t number;
  SoftmaxTraits traits;
  int64_t (*saved_by)(const double* params);
  const CustomSoftmax* custom;  // of a loss compiled apart; null for one of the list
  ForCuda for_cuda;
  // The native formula gives the loss and, if asked, the second result. Set once.
  std::function<std::vector<Tensor>(const Tensor& logits, const SoftmaxCall&)> formula;
  mutable std::atomic<const SoftmaxHandles*> handles{nullptr};

  SoftmaxLoss(std::string op, int64_t number, SoftmaxTraits traits, int64_t (*saved_by)(const double*),
              const CustomSoftmax* custom = nullptr)
      : op(std::move(op)),
        number(number),
        traits(traits),
        saved_by(saved_by),
        custom(custom),
        for_cuda{!custom || custom->cuda.forward, custom ? custom->cuda_has_kernels : nullptr, {}} {}

  // Its place in the list that its kernels were compiled for.
  Softmax kernel() const { return Softmax(custom ? 0 : number); }
  const char* name() const { return op.c_str(); }
  // How many numbers a row leaves to backward: max and rest, and what else the loss sums.
  int64_t saved_statistics(Params params) const;
};

// Those of FUSEDLOSS_SOFTMAX first, in its order.
SoftmaxLoss& softmax_loss(int64_t number);
// Makes the ops of a loss compiled apart.
SoftmaxLoss& add_softmax(const std::string& name, const CustomSoftmax& custom);
// The names of its ops that overwrite the logits.
std::array<std::string, 2> softmax_ops_in_place(const SoftmaxLoss& loss);

// What the kernels own: why they do not own a call, tensors being plain ones; null where they do. An op takes logits
// without rows, because a graph that was captured with open sizes may be run with them. fusedloss/_captures.py states
// the same for graphs that are being captured.
const char* declines(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                     bool takes_no_rows = false);

// The autograd side, callable without the dispatcher: the loss, and the second result or an undefined tensor.
std::tuple<Tensor, Tensor> softmax(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                                   std::optional<bool> grad_in_forward, bool in_place);

void define_softmax(torch::Library& m, const SoftmaxLoss& loss);
void implement_softmax_under_autograd(torch::Library& m, const SoftmaxLoss& loss);
void implement_softmax_on_cpu(torch::Library& m, const SoftmaxLoss& loss);
void implement_softmax_on_cuda(torch::Library& m, const SoftmaxLoss& loss);

// The layout of (C), (N, C) or (N, C, d1, ...), or none where the dimensions after C do not merge into one.
std::optional<SoftmaxLayout> layout_of(const Tensor& logits);

// The checked arguments of an op, as tensors that kernels can read.
struct SoftmaxInputs {
  Tensor logits, target;         // of a layout: logits and probabilities
  Tensor weight, sample_weight;  // in arithmetic type, or undefined
  at::DimVector row_sizes;
  int64_t ignore_index;
  Params params;
  bool wide, second;
  SoftmaxLayout layout;  // of the logits

  SoftmaxInputs(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call);
  // For an op that overwrites the logits: what it reads lies elsewhere.
  void keep_apart_from(const Tensor& overwritten);
  at::ScalarType result_dtype() const;
  void fill(SoftmaxArgs& args) const;
};

// The statistics are one tensor in arithmetic type: all rows' max, rest and what else
// SoftmaxLoss::saved_statistics counts, and last the divisor of a mean.
struct SoftmaxResults {
  Tensor loss, second, statistics;  // second is undefined where it is not wanted

  SoftmaxResults(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction);
  void set_of_no_rows(int64_t reduction);
};

void check_with_grad(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction);
void check_backward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                    const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction);

// Where a gradient goes: `result` itself, or where that has no layout, a dense tensor that is copied into it.
struct Destination {
  Tensor result, writable;

  template <class Dense>
  Destination(const Tensor& result_, Dense dense) : result(result_), writable(layout_of(result_) ? result_ : dense()) {}
  // A gradient of its own, in the order of the logits.
  static Destination fresh(const Tensor& logits, const SoftmaxInputs& inputs) {
    return {empty_gradient(logits, inputs.logits), [&] { return empty_gradient(inputs.logits, inputs.logits); }};
  }
  Tensor finish() const { return writable.is_same(result) ? result : result.copy_(writable); }
};

// On a device, which is given no logits without rows.
template <class OnDevice>
void run_forward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction, SoftmaxResults& results,
                 Tensor* grad) {
  if (inputs.logits.numel() == 0) return results.set_of_no_rows(reduction);
  OnDevice::forward(loss, inputs, reduction, results, grad);
}

template <class OnDevice>
void implement_softmax(torch::Library& m, const SoftmaxLoss& loss) {
  const std::string name = base_name(loss.op);
  m.impl(name.c_str(),
         [&loss](const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 int64_t ignore_index, Params params, bool wide, bool second, const OptionalTensor& sample_weight) {
           const SoftmaxInputs inputs(loss, logits,
                                      {target, weight, reduction, ignore_index, params, wide, second, sample_weight});
           SoftmaxResults results(loss, inputs, reduction);
           run_forward<OnDevice>(loss, inputs, reduction, results, nullptr);
           if (!second) results.second = empty_beside(inputs.logits, {0}, inputs.result_dtype());
           return std::make_tuple(std::move(results.loss), std::move(results.second), std::move(results.statistics));
         });
  m.impl((name + ".without_second").c_str(),
         [&loss](const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 int64_t ignore_index, Params params, bool wide, const OptionalTensor& sample_weight) {
           const SoftmaxInputs inputs(loss, logits,
                                      {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
           SoftmaxResults results(loss, inputs, reduction);
           run_forward<OnDevice>(loss, inputs, reduction, results, nullptr);
           return std::make_tuple(std::move(results.loss), std::move(results.statistics));
         });
  const auto with_grad = [](const SoftmaxLoss& loss, const SoftmaxInputs& inputs, const Tensor& logits,
                            int64_t reduction) {
    check_with_grad(loss, inputs, reduction);
    SoftmaxResults results(loss, inputs, reduction);
    Destination to = Destination::fresh(logits, inputs);
    run_forward<OnDevice>(loss, inputs, reduction, results, &to.writable);
    return std::make_tuple(std::move(results.loss), std::move(results.statistics), to.finish());
  };
  m.impl((name + "_with_grad").c_str(),
         [&loss, with_grad](const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                            int64_t ignore_index, Params params, bool wide, const OptionalTensor& sample_weight) {
           const SoftmaxInputs inputs(loss, logits,
                                      {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
           return with_grad(loss, inputs, logits, reduction);
         });
  m.impl((name + ".carrying").c_str(),
         [&loss, with_grad](const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                            int64_t ignore_index, Params params, bool wide, const OptionalTensor& sample_weight) {
           const SoftmaxInputs inputs(loss, logits,
                                      {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
           const auto [value, statistics, grad] = with_grad(loss, inputs, logits, reduction);
           carry(statistics, grad);
           return std::make_tuple(value, statistics);
         });
  m.impl((name + "_with_grad_").c_str(), [&loss](Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                                 int64_t reduction, int64_t ignore_index, Params params, bool wide,
                                                 const OptionalTensor& sample_weight) {
    SoftmaxInputs inputs(loss, logits, {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
    check_with_grad(loss, inputs, reduction);
    inputs.keep_apart_from(logits);
    SoftmaxResults results(loss, inputs, reduction);
    Destination to(logits, [&] { return inputs.logits; });
    run_forward<OnDevice>(loss, inputs, reduction, results, &to.writable);
    to.finish();
    return std::make_tuple(results.loss, results.statistics);
  });
  const auto make = [](const SoftmaxLoss& loss, Destination& to, const SoftmaxInputs& inputs, const Tensor& upstream,
                       const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction) {
    check_backward(loss, inputs, upstream, upstream_second, statistics, reduction);
    if (to.result.numel() != 0)
      OnDevice::backward(loss, inputs, upstream, upstream_second, statistics, reduction, to.writable);
    return to.finish();
  };
  m.impl((name + "_backward").c_str(),
         [&loss, make, with_grad](const Tensor& upstream, const OptionalTensor& upstream_second, const Tensor& logits,
                                  const Tensor& target, const OptionalTensor& weight, const Tensor& statistics,
                                  int64_t reduction, int64_t ignore_index, Params params,
                                  const OptionalTensor& sample_weight) {
           const bool wide = upstream.scalar_type() != logits.scalar_type();
           const SoftmaxInputs inputs(loss, logits,
                                      {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
           const GradientOfForward carried = take_carried(statistics);
           if (carried.made && !upstream_second && scales_exactly(logits, upstream)) {
             check_backward(loss, inputs, upstream, upstream_second, statistics, reduction);
             return scaled(carried, upstream, [&] { return std::get<2>(with_grad(loss, inputs, logits, reduction)); });
           }
           Destination to = Destination::fresh(logits, inputs);
           return make(loss, to, inputs, upstream, upstream_second, statistics, reduction);
         });
  m.impl((name + "_backward_").c_str(), [&loss, make](const Tensor& upstream, const OptionalTensor& upstream_second,
                                                      Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                                      const Tensor& statistics, int64_t reduction, int64_t ignore_index,
                                                      Params params, const OptionalTensor& sample_weight) {
    const bool wide = upstream.scalar_type() != logits.scalar_type();
    SoftmaxInputs inputs(loss, logits, {target, weight, reduction, ignore_index, params, wide, false, sample_weight});
    inputs.keep_apart_from(logits);
    check_overwritten(logits, {&upstream, &statistics, upstream_second ? &*upstream_second : nullptr});
    OptionalTensor second = upstream_second;
    if (second) second = apart_from(logits, *second);
    Destination to(logits, [&] { return inputs.logits; });
    make(loss, to, inputs, apart_from(logits, upstream), second, apart_from(logits, statistics), reduction);
  });
}

}  // namespace fusedloss
