// The losses of row sums under autograd. The gradients of all operands are made together, in backward.

#include <ATen/core/LegacyTypeDispatch.h>

#include "row_sums.h"

namespace fusedloss {

using RowSumsOp = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, int64_t, Params, bool);
using RowSumsBackwardOp = std::vector<Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                              int64_t, Params, bool, bool, bool, bool);

struct RowSumsHandles {
  c10::TypedOperatorHandle<RowSumsOp> forward;
  c10::TypedOperatorHandle<RowSumsBackwardOp> backward;

  explicit RowSumsHandles(const std::string& op)
      : forward(find_op(op).typed<RowSumsOp>()), backward(find_op(op + "_backward").typed<RowSumsBackwardOp>()) {}
};

namespace {

constexpr int64_t kWideResults = 1;  // flags

Tensor native(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call) {
  if (!call.wide) return loss.formula(first, call);
  RowSumsCall widened = call;
  widened.wide = false;
  for (OptionalTensor* tensor : {&widened.second, &widened.third, &widened.weight}) {
    if (*tensor) *tensor = (*tensor)->to(at::kFloat);
  }
  return loss.formula(first.to(at::kFloat), widened);
}

variable_list by_formula(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call,
                         const Tensor& upstream) {
  variable_list operands = {first};
  if (call.second) operands.push_back(*call.second);
  if (call.third) operands.push_back(*call.third);
  std::function<variable_list(const variable_list&)> formula;
  if (loss.formula) {
    formula = [&](const variable_list& x) {
      RowSumsCall of_views = call;
      if (x.size() > 1) of_views.second = x[1];
      if (x.size() > 2) of_views.third = x[2];
      return variable_list{native(loss, x[0], of_views)};
    };
  }
  return differentiable_gradients(loss.op, operands, {upstream}, formula);
}

variable_list backward_of_row_sums(Kept& kept, const variable_list& upstreams) {
  const Tensor& upstream = upstreams[0];
  const SavedCall& saved = kept.call;
  const RowSumsLoss& loss = row_sums_loss(saved.loss);
  variable_list gradients(size_t(loss.traits.operands));
  if (!upstream.defined()) return gradients;
  const SavedTensors tensors = kept.tensors();
  const auto given = [&](size_t i) { return tensors[i].defined() ? OptionalTensor(tensors[i]) : std::nullopt; };
  const Tensor& first = tensors[0];
  const RowSumsCall call = {
      given(1), given(2), given(3), given(4), saved.reduction, saved.params, bool(saved.flags & kWideResults)};
  if (at::GradMode::is_enabled() || needs_formula({upstream})) return by_formula(loss, first, call, upstream);
  bool wanted[kMostOperands] = {};
  for (size_t k = 0; k < gradients.size(); ++k) wanted[k] = kept.wants(k);
  at::AutoDispatchBelowADInplaceOrView guard;
  const AlignedAsRead aligned;
  const std::vector<Tensor> found =
      handles_of(loss).backward.call(upstream, first, call.second, call.third, call.target, call.weight, call.reduction,
                                     call.params, call.wide, wanted[0], wanted[1], wanted[2]);
  size_t next = 0;
  for (size_t k = 0; k < gradients.size(); ++k) {
    if (wanted[k]) gradients[k] = found[next++];
  }
  return gradients;
}

constexpr Backward kRowSumsBackward = {"RowSumsBackward", true, &backward_of_row_sums,
                                       [](int64_t loss) { return row_sums_loss(loss).op; }};

}  // namespace

Tensor row_sums(const RowSumsLoss& loss, const Tensor& first, const RowSumsCall& call) {
  Tensor value;
  {
    const BelowAutograd guard;
    value = handles_of(loss).forward.call(first, call.second, call.third, call.target, call.weight, call.reduction,
                                          call.params, call.wide);
  }
  const Tensor *second = pointer_to(call.second), *third = pointer_to(call.third);
  c10::SmallVector<const Tensor*, kMostOperands> operands = {&first};
  if (second) operands.push_back(second);
  if (third) operands.push_back(third);
  const SavedCall saved = {
      loss.number, call.reduction, 0, call.wide ? kWideResults : 0, {call.params.begin(), call.params.end()}};
  differentiate(kRowSumsBackward, saved, {}, operands,
                {&first, second, third, pointer_to(call.target), pointer_to(call.weight)}, {&value});
  return value;
}

void define_row_sums(torch::Library& m, const RowSumsLoss& loss) {
  const std::string name = base_name(loss.op);
  const std::string arguments =
      "Tensor first, Tensor? second, Tensor? third, Tensor? target, Tensor? weight, int reduction, float[] params, "
      "bool wide=False";
  m.def((name + "(" + arguments + ") -> Tensor").c_str());
  m.def((name + "_backward(Tensor upstream, " + arguments +
         ", bool of_first=True, bool of_second=False, bool of_third=False) -> Tensor[]")
            .c_str());
}

void implement_row_sums_under_autograd(torch::Library& m, const RowSumsLoss& loss) {
  m.impl(
      base_name(loss.op).c_str(),
      [&loss](const Tensor& first, const OptionalTensor& second, const OptionalTensor& third,
              const OptionalTensor& target, const OptionalTensor& weight, int64_t reduction, Params params, bool wide) {
        const RowSumsCall call = {second, third, target, weight, reduction, params, wide};
        if (needs_formula({first, second, third, target, weight})) return native(loss, first, call);
        return row_sums(loss, first, call);
      });
  refuse_derivatives(m, loss.op + "_backward");
}

}  // namespace fusedloss
