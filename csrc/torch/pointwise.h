// What the pointwise family is in torch whatever the device: its losses, its ops' arguments, checks and results. A
// device adds
//
//   static void forward(const PointwiseLoss&, PointwiseInputs&, int64_t reduction, Tensor& value, Tensor* grad);
//   static void backward(const PointwiseLoss&, PointwiseInputs&, const Tensor& upstream, int64_t reduction,
//                        Of, Tensor& grad);
//
// where a null grad is not wanted; in forward it is made for an upstream gradient of 1.
#pragma once

#include <c10/util/SmallVector.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "../kernels/custom.h"
#include "carried.h"

namespace fusedloss {

// Which operand a gradient is that to.
enum class Of { Input, Target, Third };

// A call but for its input and target.
struct PointwiseCall {
  OptionalTensor weight;  // a factor of the loss
  OptionalTensor third;   // what some losses read beside x and t: a factor of the term for a target of 1, a variance
  int64_t reduction;
  Params params;
  bool wide = false;                    // results in float32 of a half-precision input
  std::optional<int64_t> ignore_index;  // given: targets are class indices, and rows of this one count nowhere
};

struct PointwiseHandles;

struct PointwiseLoss {
  std::string op;  // "fusedloss::huber"
  int64_t number;
  PointwiseTraits traits;
  CpuPointwise cpu;    // of a loss compiled apart; one of the list has one for each instruction set
  CudaPointwise cuda;  // null where it was compiled for the CPU alone
  ForCuda for_cuda;
  // The native formula, differentiated where a backward is itself differentiated. Set once.
  std::function<Tensor(const Tensor& input, const Tensor& target, const PointwiseCall&)> formula;
  mutable std::atomic<const PointwiseHandles*> handles{nullptr};

  PointwiseLoss(std::string op, int64_t number, PointwiseTraits traits, CpuPointwise cpu, CudaPointwise cuda,
                bool (*cuda_has_kernels)())
      : op(std::move(op)),
        number(number),
        traits(traits),
        cpu(cpu),
        cuda(cuda),
        for_cuda{cuda != nullptr, cuda_has_kernels, {}} {}
};

// Those of FUSEDLOSS_POINTWISE first, in its order.
PointwiseLoss& pointwise_loss(int64_t number);
// Makes the ops of a loss compiled apart.
PointwiseLoss& add_pointwise(const std::string& name, const CustomPointwise& custom);

// What the kernels own: why they do not own a call, tensors being plain ones; null where they do. `wide` is what
// call.wide must be, which follows from the dtypes. An op takes empty inputs, because a graph that was captured with
// open sizes may be run with them. fusedloss/_captures.py states the same for graphs that are being captured.
const char* declines(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call,
                     bool autocast, bool& wide, bool takes_empty = false);

// The autograd side, callable without the dispatcher: a differentiable loss. Operands of different shapes broadcast.
Tensor pointwise(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call,
                 GradientIn gradient);

void define_pointwise(torch::Library& m, const PointwiseLoss& loss);
void implement_pointwise_under_autograd(torch::Library& m, const PointwiseLoss& loss);
void implement_pointwise_on_cpu(torch::Library& m, const PointwiseLoss& loss);
void implement_pointwise_on_cuda(torch::Library& m, const PointwiseLoss& loss);

// Whether a loss has a gradient to its target or its third operand.
inline bool has_gradient(const PointwiseLoss& loss, Of of) {
  if (of == Of::Third) return loss.traits.has_third_slope;
  return loss.traits.of_difference || loss.traits.has_target_slope;
}

// What a backward pass makes and the sign of its scale: a difference's slopes are one, but for the sign.
struct Slope {
  PointwiseResult result;
  double sign;
};
inline Slope slope_of(const PointwiseLoss& loss, Of of) {
  if (of == Of::Input) return {PointwiseResult::Grad, 1};
  if (of == Of::Third) return {PointwiseResult::ThirdGrad, 1};
  return loss.traits.of_difference ? Slope{PointwiseResult::Grad, -1} : Slope{PointwiseResult::TargetGrad, 1};
}

// The checked arguments of an op: tensors of any layout, of one shape but for class indices.
struct PointwiseInputs {
  Tensor input, target;
  OptionalTensor weight, third;
  std::optional<int64_t> ignore_index;
  Params params;

  PointwiseInputs(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call);

  at::ScalarType result_dtype(bool wide) const { return wide ? at::kFloat : input.scalar_type(); }
  Tensor empty_losses(const PointwiseLoss& loss, bool wide) const;  // in torch's order
  // `unrounded`: in the arithmetic type, for a sum.
  Tensor empty_gradient_of(Of, const Tensor& given_input, bool unrounded) const;
  // What a mean divides by; over class indices only a device knows how many rows count.
  double divisor(int64_t reduction) const { return reduction == kMean ? double(input.numel()) : 1.0; }
  // With the losses or gradients that are written, and the upstream gradient, if any. The arguments point into this.
  void fill(PointwiseArgs& args, const Tensor* output, const Tensor* upstream);

 private:
  std::vector<Tensor> copies;
  struct Reading;
  using Readings = c10::SmallVector<Reading, 5>;
  void fill_elements(PointwiseArgs& args, Readings& readings, const Tensor* output);
  void fill_rows(PointwiseArgs& args, Readings& readings);
};

// On a device, which is given no empty input.
template <class OnDevice>
void run_forward(const PointwiseLoss& loss, PointwiseInputs& inputs, int64_t reduction, Tensor& value, Tensor* grad) {
  if (inputs.input.numel() == 0) return set_of_nothing(value, reduction);
  OnDevice::forward(loss, inputs, reduction, value, grad);
}

template <class OnDevice>
void implement_pointwise(torch::Library& m, const PointwiseLoss& loss) {
  const std::string name = base_name(loss.op);
  m.impl(name.c_str(),
         [&loss](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 Params params, const OptionalTensor& third, bool wide, std::optional<int64_t> ignore_index) {
           PointwiseInputs inputs(loss, input, target, {weight, third, reduction, params, wide, ignore_index});
           Tensor value = reduction == kNone ? inputs.empty_losses(loss, wide)
                                             : empty_beside(input, {}, inputs.result_dtype(wide));
           run_forward<OnDevice>(loss, inputs, reduction, value, nullptr);
           return value;
         });
  const auto with_grad = [](const PointwiseLoss& loss, PointwiseInputs& inputs, const Tensor& input, int64_t reduction,
                            bool wide) {
    check_gradient_in_forward(loss.op.c_str(), input, reduction);
    Tensor value = empty_beside(input, {}, inputs.result_dtype(wide));
    Tensor grad = empty_gradient(input, inputs.input);
    run_forward<OnDevice>(loss, inputs, reduction, value, &grad);
    return std::make_tuple(value, grad);
  };
  m.impl(
      (name + "_with_grad").c_str(),
      [&loss, with_grad](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         Params params, const OptionalTensor& third, bool wide, std::optional<int64_t> ignore_index) {
        PointwiseInputs inputs(loss, input, target, {weight, third, reduction, params, wide, ignore_index});
        return with_grad(loss, inputs, input, reduction, wide);
      });
  m.impl(
      (name + ".carrying").c_str(),
      [&loss, with_grad](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         Params params, const OptionalTensor& third, bool wide, std::optional<int64_t> ignore_index) {
        PointwiseInputs inputs(loss, input, target, {weight, third, reduction, params, wide, ignore_index});
        const auto [value, grad] = with_grad(loss, inputs, input, reduction, wide);
        const Tensor carrier = empty_beside(input, {1}, at::kFloat).zero_();
        carry(carrier, grad);
        return std::make_tuple(value, carrier);
      });
  m.impl((name + "_backward").c_str(),
         [&loss, with_grad](const Tensor& upstream, const Tensor& input, const Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, Params params, const OptionalTensor& third,
                            bool wide, std::optional<int64_t> ignore_index, bool of_target,
                            const OptionalTensor& carrier, bool of_third, bool unrounded) {
           PointwiseInputs inputs(loss, input, target, {weight, third, reduction, params, wide, ignore_index});
           check_upstream(loss.op.c_str(), upstream, inputs.result_dtype(wide), reduction, input.sizes(), input);
           TORCH_CHECK(!(of_target && of_third), loss.op, "_backward: expected a gradient to one operand, got two");
           const Of of = of_third ? Of::Third : of_target ? Of::Target : Of::Input;
           TORCH_CHECK(of == Of::Input || has_gradient(loss, of), loss.op,
                       " is not differentiable with respect to its ", of_third ? "third operand" : "target");
           TORCH_CHECK(!of_third || third, loss.op, "_backward: expected a third operand, got none");
           TORCH_CHECK(of == Of::Input || !ignore_index, loss.op,
                       "_backward: expected targets of the input's shape for a gradient to another operand, got class "
                       "indices");
           const GradientOfForward carried = carrier && of == Of::Input ? take_carried(*carrier) : GradientOfForward{};
           if (carried.made && scales_exactly(input, upstream)) {
             return scaled(carried, upstream,
                           [&] { return std::get<1>(with_grad(loss, inputs, input, reduction, wide)); });
           }
           Tensor grad = inputs.empty_gradient_of(of, input, unrounded);
           if (input.numel() != 0) OnDevice::backward(loss, inputs, upstream, reduction, of, grad);
           return grad;
         });
}

}  // namespace fusedloss
