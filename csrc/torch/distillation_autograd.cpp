// The divergence of a student's and a teacher's rows under autograd. The gradient is the student's alone.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "distillation.h"

namespace fusedloss {

namespace {

using Name = std::string_view;
using DivergenceOp = DistillationResults(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         Name, Name, Name, int64_t, double, double, bool, bool, bool);
using DivergenceCarryingOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                        const OptionalTensor&, Name, Name, Name, int64_t, double,
                                                        double, bool);
using DivergenceBackwardOp = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const OptionalTensor&, const OptionalTensor&, const Tensor&, Name, Name, Name,
                                    int64_t, double, double);

struct DivergenceHandles {
  c10::TypedOperatorHandle<DivergenceOp> forward = find_op("fusedloss::kl_divergence").typed<DivergenceOp>();
  c10::TypedOperatorHandle<DivergenceCarryingOp> carrying =
      find_op("fusedloss::kl_divergence.carrying").typed<DivergenceCarryingOp>();
  c10::TypedOperatorHandle<DivergenceBackwardOp> backward =
      find_op("fusedloss::kl_divergence_backward").typed<DivergenceBackwardOp>();
};

const DivergenceHandles& divergence_handles() {
  static const DivergenceHandles found;
  return found;
}

Name direction_of(const DistillationCall& call) { return kDirections[int(call.divergence)]; }
Name teacher_of(const DistillationCall& call) { return kTeachers[int(call.teacher_is)]; }
Name reduction_of(const DistillationCall& call) { return kRowsReductions[int(call.reduction)]; }

DistillationResults divergence_of(const Tensor& student, const Tensor& teacher, const DistillationCall& call,
                                  bool with_grad) {
  const AlignedAsRead aligned;
  return divergence_handles().forward.call(student, teacher, call.labels, call.weight, direction_of(call),
                                           teacher_of(call), reduction_of(call), call.ignore_index, call.temperature,
                                           call.beta, call.wide, call.with_lse, with_grad);
}

// What a SavedCall has no place for lies in its flags.
constexpr int64_t kWideDivergence = 1, kWithLse = 2, kDirectionFrom = 4, kTeacherFrom = 16;

SavedCall saved_divergence(const DistillationCall& call) {
  const int64_t flags = (call.wide ? kWideDivergence : 0) | (call.with_lse ? kWithLse : 0) |
                        int64_t(call.divergence) * kDirectionFrom | int64_t(call.teacher_is) * kTeacherFrom;
  return {0, int64_t(call.reduction), call.ignore_index, flags, {call.temperature, call.beta}};
}

DistillationCall divergence_call(const SavedCall& saved, const SavedTensors& tensors) {
  const auto given = [&](size_t i) { return tensors[i].defined() ? OptionalTensor(tensors[i]) : std::nullopt; };
  DistillationCall call;
  call.labels = given(2);
  call.weight = given(3);
  call.divergence = Divergence(saved.flags / kDirectionFrom % 4);
  call.teacher_is = TeacherIs(saved.flags / kTeacherFrom % 4);
  call.reduction = RowsReduction(saved.reduction);
  call.ignore_index = saved.ignore_index;
  call.temperature = saved.params[0];
  call.beta = saved.params[1];
  call.wide = saved.flags & kWideDivergence;
  call.with_lse = saved.flags & kWithLse;
  return call;
}

variable_list by_formula(const Tensor& student, const Tensor& teacher, const DistillationCall& call,
                         const Tensor& upstream, const OptionalTensor& upstream_lse) {
  std::function<variable_list(const variable_list&)> formula;
  if (distillation_formula()) {
    formula = [&](const variable_list& x) {
      variable_list values = distillation_formula()(x[0], teacher, call);
      if (!upstream_lse) values.resize(1);
      return values;
    };
  }
  const variable_list upstreams = upstream_lse ? variable_list{upstream, *upstream_lse} : variable_list{upstream};
  return differentiable_gradients("fusedloss::kl_divergence", {student}, upstreams, formula);
}

variable_list backward_of_divergence(Kept& kept, const variable_list& upstreams) {
  const GradientOfForward of_forward = take_gradient(kept, upstreams[0]);
  const bool of_lse = kept.call.flags & kWithLse && upstreams[1].defined();
  const OptionalTensor upstream_lse = of_lse ? OptionalTensor(upstreams[1]) : std::nullopt;
  const bool differentiable = at::GradMode::is_enabled() || needs_formula({upstreams[0], upstream_lse});
  if (!differentiable && of_forward.left.defined() && scales_exactly(of_forward.left, upstreams[0])) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return {scaled(of_forward.left, upstreams[0])};
  }
  if (!upstreams[0].defined() && !of_lse) return variable_list(1);
  const SavedTensors tensors = kept.tensors();
  const Tensor &student = tensors[0], &teacher = tensors[1], &statistics = tensors[4];
  const DistillationCall call = divergence_call(kept.call, tensors);
  Tensor upstream = upstreams[0];
  if (!upstream.defined()) {
    const bool none = call.reduction == RowsReduction::None;
    upstream = at::zeros_symint(none ? upstream_lse->sym_sizes() : c10::SymIntArrayRef(), upstream_lse->options());
  }
  if (differentiable) return by_formula(student, teacher, call, upstream, upstream_lse);
  at::AutoDispatchBelowADInplaceOrView guard;
  if (of_forward.made && scales_exactly(student, upstream)) {
    return {scaled(of_forward, upstream, [&] { return std::get<3>(divergence_of(student, teacher, call, true)); })};
  }
  const AlignedAsRead aligned;
  return {divergence_handles().backward.call(upstream, upstream_lse, student, teacher, call.labels, call.weight,
                                             statistics, direction_of(call), teacher_of(call), reduction_of(call),
                                             call.ignore_index, call.temperature, call.beta)};
}

constexpr Backward kDivergenceBackward = {"KlDivergenceBackward", true, &backward_of_divergence};

// Where the gradient of a call may be made. Beside an lse backward has more to add than a factor.
bool pays_in_forward(const Tensor& student, const DistillationCall& call) {
  const int64_t reduction = call.reduction == RowsReduction::None ? kNone : kSum;
  return !call.with_lse && device_for(student).row_gradient_in_forward_pays && at::GradMode::is_enabled() &&
         student.requires_grad() && gradient_in_forward_pays(student, reduction);
}

// Of rows (N, C), whose labels are int64.
DistillationResults differentiable_divergence(const Tensor& student, const Tensor& teacher,
                                              const DistillationCall& call, GradientIn gradient) {
  Tensor loss, lse, statistics, grad;
  {
    const BelowAutograd guard;
    if (gradient == GradientIn::Carried) {
      std::tie(loss, statistics) = divergence_handles().carrying.call(
          student, teacher, call.labels, call.weight, direction_of(call), teacher_of(call), reduction_of(call),
          call.ignore_index, call.temperature, call.beta, call.wide);
    } else {
      std::tie(loss, lse, statistics, grad) = divergence_of(student, teacher, call, gradient == GradientIn::Forward);
    }
  }
  GradientOfForward of_forward;
  if (gradient == GradientIn::Forward) of_forward = {true, std::move(grad)};
  const std::array<const Tensor*, 2> functions = {&loss, &lse};
  differentiate(kDivergenceBackward, saved_divergence(call), std::move(of_forward), {&student},
                {&student, &teacher, pointer_to(call.labels), pointer_to(call.weight), &statistics},
                {functions.data(), call.with_lse ? size_t(2) : 1});
  return {loss, lse, statistics, Tensor()};
}

// The native formula in the shape of the op's results; its backward needs no statistics, which are zeros.
DistillationResults native(const Tensor& student, const Tensor& teacher, const DistillationCall& call) {
  const variable_list values = distillation_formula()(student, teacher, call);
  const at::ScalarType arithmetic =
      at::promote_types(at::promote_types(student.scalar_type(), teacher.scalar_type()), at::kFloat);
  return {values[0], call.with_lse ? values[1] : Tensor(),
          at::zeros_symint({student.sym_size(0) * kSavedOfPair}, student.options().dtype(arithmetic)), Tensor()};
}

Tensor as_rows(const Tensor& numbers) {
  return numbers.dim() == 2 ? numbers : numbers.reshape({numbers.numel() / numbers.size(-1), numbers.size(-1)});
}

}  // namespace

std::tuple<Tensor, Tensor> distillation(const Tensor& student, const Tensor& teacher, DistillationCall call) {
  if (call.labels) call.labels = call.labels->to(at::kLong).reshape(-1);
  if (call.weight) call.weight = call.weight->reshape(-1);
  auto [loss, lse, statistics, grad] =
      differentiable_divergence(as_rows(student), as_rows(teacher), call,
                                pays_in_forward(student, call) ? GradientIn::Forward : GradientIn::Backward);
  if (student.dim() != 2) {
    const at::IntArrayRef rows = student.sizes().slice(0, size_t(student.dim() - 1));
    if (call.reduction == RowsReduction::None) loss = loss.reshape(rows);
    if (call.with_lse) lse = lse.reshape(rows);
  }
  return {std::move(loss), std::move(lse)};
}

void implement_distillation_under_autograd(torch::Library& m) {
  m.impl("kl_divergence", [](const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                             const OptionalTensor& weight, Name direction, Name teacher_is, Name reduction,
                             int64_t ignore_index, double temperature, double beta, bool wide, bool with_lse,
                             bool with_grad) {
    const DistillationCall call(labels, weight, direction, teacher_is, reduction, ignore_index, temperature, beta, wide,
                                with_lse);
    if (with_grad) {
      TORCH_CHECK(
          !at::GradMode::is_enabled() || !student.requires_grad(),
          "kl_divergence: expected a student that requires no gradient beside with_grad=True, whose gradient has "
          "no derivative");
      at::AutoDispatchBelowADInplaceOrView guard;
      return divergence_of(student, teacher, call, true);
    }
    auto results =
        needs_formula({student, teacher, labels, weight})
            ? native(student, teacher, call)
            : differentiable_divergence(student, teacher, call,
                                        pays_in_forward(student, call) ? GradientIn::Carried : GradientIn::Backward);
    auto& [loss, lse, statistics, grad] = results;
    if (!lse.defined()) lse = at::empty({0}, loss.options());
    grad = at::empty({0}, student.options());
    return results;
  });
  for (const char* op : {"kl_divergence.carrying", "kl_divergence_backward"}) refuse_derivatives(m, op);
}

}  // namespace fusedloss
