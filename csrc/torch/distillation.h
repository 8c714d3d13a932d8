// The divergence of a student's and a teacher's rows in torch, whatever the device: its call, checks and results. A
// device adds
//
//   static void forward(DistillationArgs&, const DistillationInputs&, const Tensor& losses, Tensor& loss);
//   static void backward(DistillationArgs&, const DistillationInputs&);
//
// which set args.scale by the reduction; `loss` is undefined where there is none.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "../kernels/distillation.h"
#include "autograd_steps.h"
#include "carried.h"
#include "common.h"

namespace fusedloss {

// As a call names them, in the order of Divergence, TeacherIs and RowsReduction.
inline constexpr const char* kDirections[] = {"forward", "reverse", "jsd"};
inline constexpr const char* kTeachers[] = {"logits", "log_probs", "probs"};
inline constexpr const char* kRowsReductions[] = {"none", "sum", "batchmean", "mean"};
enum class RowsReduction { None, Sum, MeanOfRows, MeanOfElements };

// A call but for the rows.
struct DistillationCall {
  OptionalTensor labels, weight;  // of the rows
  Divergence divergence;
  TeacherIs teacher_is;
  RowsReduction reduction;
  int64_t ignore_index;
  double temperature, beta;
  bool wide = false;  // results in the arithmetic type
  bool with_lse = false;

  DistillationCall() = default;
  DistillationCall(const OptionalTensor& labels, const OptionalTensor& weight, std::string_view direction,
                   std::string_view teacher_is, std::string_view reduction, int64_t ignore_index, double temperature,
                   double beta, bool wide, bool with_lse);
};

// The loss, the lse and what else forward makes.
using DistillationResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, lse, statistics, grad

// The native formula of rows (N, C): the loss and the lse, of which `call.wide` is the dtype. Set once.
using DistillationFormula =
    std::function<variable_list(const Tensor& student, const Tensor& teacher, const DistillationCall&)>;
DistillationFormula& distillation_formula();

// What the kernels own: why they do not own a call, tensors being plain ones; null where they do. Sets `call.wide`.
const char* declines(const Tensor& student, const Tensor& teacher, DistillationCall& call, bool autocast);

// The autograd side, callable without the dispatcher: the loss of rows (..., C), and their lse, which is undefined
// where the call does not want it.
std::tuple<Tensor, Tensor> distillation(const Tensor& student, const Tensor& teacher, DistillationCall call);

// The checked arguments of an op.
struct DistillationInputs {
  Tensor student, teacher;  // [rows, classes]
  Tensor labels, weight;    // dense [rows], or undefined
  RowsReduction reduction;
  at::ScalarType arithmetic, result;
  DistillationArgs args = {};

  DistillationInputs(const Tensor& student, const Tensor& teacher, const DistillationCall& call);

  int64_t rows() const { return args.rows; }
  bool none() const { return reduction == RowsReduction::None; }
  // What a mean divides by for each row that counts; 0 for no mean.
  double divisor_of_row() const {
    if (reduction == RowsReduction::MeanOfRows) return 1;
    return reduction == RowsReduction::MeanOfElements ? double(args.classes) : 0;
  }
  Tensor write_gradient();             // makes the gradient's memory
  Tensor write_gradient_in_forward();  // the same, of a call that has a reduction
  void check_numbers(const char* what, const Tensor& tensor, at::IntArrayRef sizes) const;
  void check_backward(const Tensor& upstream, const OptionalTensor& upstream_lse, const Tensor& statistics) const;
};

void define_distillation(torch::Library& m);
void implement_distillation_under_autograd(torch::Library& m);
void implement_distillation_on_cpu(torch::Library& m);
void implement_distillation_on_cuda(torch::Library& m);

// The loss, the lse and the statistics; the gradient is written too where args.grad says where.
template <class OnDevice>
std::tuple<Tensor, Tensor, Tensor> run_forward(DistillationInputs& inputs, bool with_lse) {
  const Tensor& student = inputs.student;
  const int64_t rows = inputs.rows();
  const Tensor losses = empty_beside(student, {rows}, inputs.arithmetic);
  const Tensor lse = empty_beside(student, {with_lse ? rows : 0}, inputs.arithmetic);
  const Tensor statistics = empty_beside(student, {kSavedOfPair * rows}, inputs.arithmetic);
  Tensor loss;
  if (!inputs.none()) loss = empty_beside(student, {}, inputs.result);
  DistillationArgs& args = inputs.args;
  args.losses = losses.mutable_data_ptr();
  args.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  args.statistics = statistics.mutable_data_ptr();
  OnDevice::forward(args, inputs, losses, loss);
  return {loss.defined() ? loss : losses.to(inputs.result), lse.to(inputs.result), statistics};
}

// Writes the gradient where args.grad says.
template <class OnDevice>
void run_backward(DistillationInputs& inputs, const Tensor& upstream, const OptionalTensor& upstream_lse,
                  const Tensor& statistics) {
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
  OnDevice::backward(args, inputs);
}

template <class OnDevice>
void implement_distillation(torch::Library& m) {
  m.impl("kl_divergence",
         [](const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& weight,
            std::string_view direction, std::string_view teacher_is, std::string_view reduction, int64_t ignore_index,
            double temperature, double beta, bool wide, bool with_lse, bool with_grad) {
           const DistillationCall call(labels, weight, direction, teacher_is, reduction, ignore_index, temperature,
                                       beta, wide, with_lse);
           DistillationInputs inputs(student, teacher, call);
           const Tensor grad =
               with_grad ? inputs.write_gradient_in_forward() : empty_beside(student, {0}, student.scalar_type());
           return std::tuple_cat(run_forward<OnDevice>(inputs, with_lse), std::make_tuple(grad));
         });
  m.impl("kl_divergence.carrying",
         [](const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& weight,
            std::string_view direction, std::string_view teacher_is, std::string_view reduction, int64_t ignore_index,
            double temperature, double beta, bool wide) {
           const DistillationCall call(labels, weight, direction, teacher_is, reduction, ignore_index, temperature,
                                       beta, wide, false);
           DistillationInputs inputs(student, teacher, call);
           const Tensor grad = inputs.write_gradient_in_forward();
           const auto [loss, lse, statistics] = run_forward<OnDevice>(inputs, false);
           if (inputs.rows() > 0) carry(statistics, grad);
           return std::make_tuple(loss, statistics);
         });
  m.impl("kl_divergence_backward",
         [](const Tensor& upstream, const OptionalTensor& upstream_lse, const Tensor& student, const Tensor& teacher,
            const OptionalTensor& labels, const OptionalTensor& weight, const Tensor& statistics,
            std::string_view direction, std::string_view teacher_is, std::string_view reduction, int64_t ignore_index,
            double temperature, double beta) {
           const DistillationCall call(labels, weight, direction, teacher_is, reduction, ignore_index, temperature,
                                       beta, false, false);
           DistillationInputs inputs(student, teacher, call);
           inputs.check_backward(upstream, upstream_lse, statistics);
           const GradientOfForward carried = take_carried(statistics);
           if (carried.made && !upstream_lse && scales_exactly(student, upstream)) {
             return scaled(carried, upstream, [&] {
               const Tensor grad = inputs.write_gradient_in_forward();
               run_forward<OnDevice>(inputs, false);
               return grad;
             });
           }
           Tensor grad = inputs.write_gradient();
           run_backward<OnDevice>(inputs, upstream, upstream_lse, statistics);
           return grad;
         });
}

}  // namespace fusedloss
