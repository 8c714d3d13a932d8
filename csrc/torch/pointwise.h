// What the pointwise family is in torch whatever the device: its losses, its ops' arguments, checks and results. A
// device adds
//
//   static void forward(const PointwiseLoss&, PointwiseInputs&, int64_t reduction, Tensor& value, Tensor* grad);
//   static void backward(const PointwiseLoss&, PointwiseInputs&, const Tensor& upstream, int64_t reduction,
//                        bool of_target, Tensor& grad);
//
// where a null grad is not wanted; in forward it is made for an upstream gradient of 1.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "common.h"

namespace fusedloss {

// A call but for its input and target.
struct PointwiseCall {
  OptionalTensor weight, pos_weight;  // factors of the loss, and of its term for a target of 1
  int64_t reduction;
  Params params;
  bool wide = false;  // results in float32 of a half-precision input
};

struct PointwiseHandles;

struct PointwiseLoss {
  std::string op;  // "fusedloss::huber"
  int64_t number;
  PointwiseTraits traits;
  bool (*valid)(const double* params);
  CpuPointwise cpu;    // of a loss compiled apart; one of the list has one for each instruction set
  CudaPointwise cuda;  // null where it was compiled for the CPU alone
  // The native formula, differentiated where a backward is itself differentiated. Set once.
  std::function<Tensor(const Tensor& input, const Tensor& target, const PointwiseCall&)> formula;
  mutable std::atomic<const PointwiseHandles*> handles{nullptr};

  PointwiseLoss(std::string op, int64_t number, PointwiseTraits traits, bool (*valid)(const double*), CpuPointwise cpu,
                CudaPointwise cuda)
      : op(std::move(op)), number(number), traits(traits), valid(valid), cpu(cpu), cuda(cuda) {}
};

// Those of FUSEDLOSS_POINTWISE first, in its order.
PointwiseLoss& pointwise_loss(int64_t number);
// Makes the ops of a loss compiled apart.
PointwiseLoss& add_pointwise(const std::string& name, const CustomPointwise& custom);

// Why the kernels do not own a call, tensors being plain ones on one device; null where they do. Sets what follows from
// its dtypes.
const char* declines_pointwise(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                               PointwiseCall& call, bool autocast);

// The autograd side, callable without the dispatcher: a differentiable loss. Inputs of different shapes broadcast.
Tensor pointwise(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call,
                 bool grad_in_forward);

// The checked arguments of an op: tensors of one shape, of any layout.
struct PointwiseInputs {
  Tensor input, target;
  OptionalTensor weight, pos_weight;
  Params params;

  PointwiseInputs(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call);

  at::ScalarType result_dtype(bool wide) const { return wide ? at::kFloat : input.scalar_type(); }
  Tensor empty_losses(const PointwiseLoss& loss, bool wide) const;  // in torch's order
  double divisor(int64_t reduction) const { return reduction == kMean ? double(input.numel()) : 1.0; }
  // With the losses or gradients that are written, and the upstream gradient, if any. The arguments point into this.
  void fill(PointwiseArgs& args, const Tensor* output, const Tensor* upstream);

 private:
  std::vector<Tensor> copies;
};

template <class Device>
void implement_pointwise(torch::Library& m, const PointwiseLoss& loss) {
  const std::string name = loss.op.substr(loss.op.find("::") + 2);
  m.impl(name.c_str(), [&loss](const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, Params params, const OptionalTensor& pos_weight, bool wide) {
    PointwiseInputs inputs(loss, input, target, {weight, pos_weight, reduction, params, wide});
    Tensor value = reduction == kNone ? inputs.empty_losses(loss, wide)
                                      : at::empty({}, input.options().dtype(inputs.result_dtype(wide)));
    Device::forward(loss, inputs, reduction, value, nullptr);
    return value;
  });
  m.impl((name + "_with_grad").c_str(),
         [&loss](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 Params params, const OptionalTensor& pos_weight, bool wide) {
           PointwiseInputs inputs(loss, input, target, {weight, pos_weight, reduction, params, wide});
           check_gradient_in_forward(loss.op.c_str(), input, reduction);
           Tensor value = at::empty({}, input.options().dtype(inputs.result_dtype(wide)));
           Tensor grad = empty_gradient(input);
           Device::forward(loss, inputs, reduction, value, &grad);
           return std::make_tuple(value, grad);
         });
  m.impl((name + "_backward").c_str(),
         [&loss](const Tensor& upstream, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 int64_t reduction, Params params, const OptionalTensor& pos_weight, bool wide, bool of_target) {
           PointwiseInputs inputs(loss, input, target, {weight, pos_weight, reduction, params, wide});
           check_upstream(loss.op.c_str(), upstream, inputs.result_dtype(wide), reduction, input.sizes(), input);
           TORCH_CHECK(!of_target || loss.traits.of_difference || loss.traits.has_target_slope, loss.op,
                       " is not differentiable with respect to its target");
           Tensor grad = empty_gradient(of_target ? target : input);
           Device::backward(loss, inputs, upstream, reduction, of_target, grad);
           return grad;
         });
}

void implement_pointwise_on_cpu(torch::Library& m, const PointwiseLoss& loss);
void implement_pointwise_on_cuda(torch::Library& m, const PointwiseLoss& loss);

}  // namespace fusedloss
