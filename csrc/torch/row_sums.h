// What the losses of row sums are in torch whatever the device: their ops' arguments, checks and results. A device adds
//
//   static void forward(const RowSumsLoss&, const RowSumsInputs&, int64_t reduction, Tensor& value);
//   static void backward(const RowSumsLoss&, const RowSumsInputs&, const Tensor& upstream, int64_t reduction,
//                        const RowGradients&);
#pragma once

#include <c10/util/SmallVector.h>

#include <array>
#include <atomic>
#include <vector>

#include "autograd_steps.h"

namespace fusedloss {

// A call but for its first operand.
struct RowSumsCall {
  OptionalTensor second, third;
  OptionalTensor target;  // labels, or class indices
  OptionalTensor weight;  // of the classes
  int64_t reduction;
  Params params;
  bool wide = false;  // results in float32 of half-precision operands
};

struct RowSumsHandles;

struct RowSumsLoss {
  std::string op;  // "fusedloss::triplet_margin"
  int64_t number;
  RowSumsTraits traits;
  // The native formula, differentiated where a backward is itself differentiated. Set once.
  std::function<Tensor(const Tensor& first, const RowSumsCall&)> formula;
  mutable std::atomic<const RowSumsHandles*> handles{nullptr};

  RowSums kernel() const { return RowSums(number); }
};

// In the order of FUSEDLOSS_ROW_SUMS.
RowSumsLoss& row_sums_loss(int64_t number);

// What the kernels own: why they do not own a call, tensors being plain ones; null where they do. `wide` is what
// call.wide must be. An op takes empty operands, because a graph that was captured with open sizes may be run with
// them. fusedloss/_captures.py states the same for graphs that are being captured.
const char* declines(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call, bool autocast, bool& wide,
                     bool takes_empty = false);

// The autograd side, callable without the dispatcher: a differentiable loss.
Tensor row_sums(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call);

void define_row_sums(torch::Library& m, const RowSumsLoss& loss);
void implement_row_sums_under_autograd(torch::Library& m, const RowSumsLoss& loss);
void implement_row_sums_on_cpu(torch::Library& m, const RowSumsLoss& loss);
void implement_row_sums_on_cuda(torch::Library& m, const RowSumsLoss& loss);

// The checked arguments of an op.
struct RowSumsInputs {
  c10::SmallVector<Tensor, kMostOperands> operands;
  OptionalTensor target, weight;  // contiguous, the weight in the arithmetic type
  Params params;
  bool wide;
  int64_t rows, columns;

  RowSumsInputs(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call);

  at::ScalarType result_dtype() const { return wide ? at::kFloat : operands[0].scalar_type(); }
  at::DimVector losses_sizes() const;
  double divisor(int64_t reduction) const { return reduction == kMean ? double(rows) : 1.0; }
  void fill(RowSumsArgs& args) const;
};

// A gradient for each operand, undefined where it is not wanted.
using RowGradients = std::array<Tensor, kMostOperands>;
inline void fill_gradients(RowSumsArgs& args, const RowGradients& gradients) {
  for (int k = 0; k < kMostOperands; ++k) {
    args.grads[k] = gradients[size_t(k)].defined() ? gradients[size_t(k)].mutable_data_ptr() : nullptr;
  }
}

template <class OnDevice>
void implement_row_sums(torch::Library& m, const RowSumsLoss& loss) {
  const std::string name = base_name(loss.op);
  m.impl(name.c_str(), [&loss](const Tensor& first, const OptionalTensor& second, const OptionalTensor& third,
                               const OptionalTensor& target, const OptionalTensor& weight, int64_t reduction,
                               Params params, bool wide) {
    const RowSumsInputs inputs(loss, first, {second, third, target, weight, reduction, params, wide});
    const at::DimVector sizes = reduction == kNone ? inputs.losses_sizes() : at::DimVector();
    Tensor value = empty_beside(first, sizes, inputs.result_dtype());
    if (first.numel() == 0) {
      set_of_nothing(value, reduction);
    } else {
      OnDevice::forward(loss, inputs, reduction, value);
    }
    return value;
  });
  m.impl((name + "_backward").c_str(),
         [&loss](const Tensor& upstream, const Tensor& first, const OptionalTensor& second, const OptionalTensor& third,
                 const OptionalTensor& target, const OptionalTensor& weight, int64_t reduction, Params params,
                 bool wide, bool of_first, bool of_second, bool of_third) {
           const RowSumsInputs inputs(loss, first, {second, third, target, weight, reduction, params, wide});
           check_upstream(loss.op.c_str(), upstream, inputs.result_dtype(), reduction, inputs.losses_sizes(), first);
           const bool wanted[] = {of_first, of_second, of_third};
           RowGradients gradients;
           std::vector<Tensor> found;
           for (size_t k = 0; k < kMostOperands; ++k) {
             if (!wanted[k]) continue;
             TORCH_CHECK(k < inputs.operands.size(), loss.op, "_backward: expected a gradient to one of ",
                         inputs.operands.size(), " operands, got one to operand ", k + 1);
             const Tensor& operand = inputs.operands[k];
             gradients[k] = operand.is_contiguous() ? empty_gradient(operand, operand)
                                                    : empty_beside(operand, operand.sizes(), operand.scalar_type());
             found.push_back(gradients[k]);
           }
           if (first.numel() != 0 && !found.empty()) OnDevice::backward(loss, inputs, upstream, reduction, gradients);
           return found;
         });
}

}  // namespace fusedloss
