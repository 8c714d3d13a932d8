// The divergence of a student's and a teacher's rows in torch, whatever the device: its op, its checks and results.
// autograd and the native formula are in fusedloss/distillation. A device adds
//
//   static void forward(DistillationArgs&, const DistillationInputs&, const Tensor& losses, Tensor& loss);
//   static void backward(DistillationArgs&, const DistillationInputs&);
//
// which set args.scale by the reduction; `loss` is undefined where there is none.
#pragma once

#include <string_view>

#include "../kernels/distillation.h"
#include "common.h"

namespace fusedloss {

struct DistillationInputs {
  Tensor student, teacher;        // [rows, classes]
  Tensor labels, weight;          // dense [rows], or undefined
  bool none, by_row, by_element;  // the reduction: none; a mean over rows that count; over their elements
  at::ScalarType arithmetic, result;
  DistillationArgs args = {};

  DistillationInputs(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                     const OptionalTensor& weight, std::string_view divergence, std::string_view teacher_is,
                     std::string_view reduction, int64_t ignore_index, double temperature, double beta, bool wide);

  int64_t rows() const { return args.rows; }
  // What a mean divides by for each row that counts.
  double divisor_of_row() const { return by_row ? 1.0 : by_element ? double(args.classes) : 0.0; }
  Tensor write_gradient();  // makes the gradient's memory
  void check_numbers(const char* what, const Tensor& tensor, at::IntArrayRef sizes) const;
};

void define_distillation(torch::Library& m);
void implement_distillation_on_cpu(torch::Library& m);
void implement_distillation_on_cuda(torch::Library& m);

template <class OnDevice>
void implement_distillation(torch::Library& m) {
  m.impl("kl_divergence", [](const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                             const OptionalTensor& weight, std::string_view divergence, std::string_view teacher_is,
                             std::string_view reduction, int64_t ignore_index, double temperature, double beta,
                             bool wide, bool with_lse, bool with_grad) {
    DistillationInputs inputs(student, teacher, labels, weight, divergence, teacher_is, reduction, ignore_index,
                              temperature, beta, wide);
    TORCH_CHECK(!with_grad || !inputs.none, "kl_divergence: expected a reduction for a gradient in forward");
    const int64_t rows = inputs.rows();
    const Tensor losses = empty_beside(student, {rows}, inputs.arithmetic);
    const Tensor lse = empty_beside(student, {with_lse ? rows : 0}, inputs.arithmetic);
    const Tensor statistics = empty_beside(student, {kSavedOfPair * rows}, inputs.arithmetic);
    Tensor loss;
    if (!inputs.none) loss = empty_beside(student, {}, inputs.result);
    Tensor grad = with_grad ? inputs.write_gradient() : empty_beside(student, {0}, student.scalar_type());
    DistillationArgs& args = inputs.args;
    args.losses = losses.mutable_data_ptr();
    args.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
    args.statistics = statistics.mutable_data_ptr();
    OnDevice::forward(args, inputs, losses, loss);
    return std::make_tuple(loss.defined() ? loss : losses.to(inputs.result), lse.to(inputs.result), statistics, grad);
  });
  m.impl(
      "kl_divergence_backward", [](const Tensor& upstream, const OptionalTensor& upstream_lse, const Tensor& student,
                                   const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& weight,
                                   const Tensor& statistics, std::string_view divergence, std::string_view teacher_is,
                                   std::string_view reduction, int64_t ignore_index, double temperature, double beta) {
        DistillationInputs inputs(student, teacher, labels, weight, divergence, teacher_is, reduction, ignore_index,
                                  temperature, beta, false);
        const int64_t rows = inputs.rows();
        inputs.check_numbers("an upstream gradient", upstream, inputs.none ? at::IntArrayRef(rows) : at::IntArrayRef());
        if (upstream_lse) inputs.check_numbers("an upstream gradient of the lse", *upstream_lse, rows);
        inputs.check_numbers("statistics", statistics, kSavedOfPair * rows);
        TORCH_CHECK(statistics.is_contiguous() && statistics.scalar_type() == inputs.arithmetic,
                    "kl_divergence_backward: expected the statistics of the forward, got ", statistics.scalar_type(),
                    " of strides ", statistics.strides());
        const Upstream of_value = read_upstream(upstream.to(inputs.arithmetic));
        Upstream of_lse;
        DistillationArgs& args = inputs.args;
        args.upstream = of_value.tensor.const_data_ptr();
        args.upstream_stride = of_value.stride;
        if (upstream_lse) {
          of_lse = read_upstream(upstream_lse->to(inputs.arithmetic));
          args.upstream_lse = of_lse.tensor.const_data_ptr();
          args.upstream_lse_stride = of_lse.stride;
        }
        args.statistics = const_cast<void*>(statistics.const_data_ptr());
        Tensor grad = inputs.write_gradient();
        OnDevice::backward(args, inputs);
        return grad;
      });
}

}  // namespace fusedloss
