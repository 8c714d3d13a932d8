// The softmax family under autograd.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "second_derivatives.h"

namespace fusedloss {

using ForwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                     int64_t, Params, bool, bool, const OptionalTensor&);
using WithGradOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                      int64_t, Params, bool, const OptionalTensor&);
using WithoutSecondOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                   int64_t, Params, bool, const OptionalTensor&);
using WithGradInPlaceOp = std::tuple<Tensor, Tensor>(Tensor, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                                     Params, bool, const OptionalTensor&);
using BackwardOp = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                          const Tensor&, int64_t, int64_t, Params, const OptionalTensor&);
using BackwardInPlaceOp = void(const Tensor&, const OptionalTensor&, Tensor, const Tensor&, const OptionalTensor&,
                               const Tensor&, int64_t, int64_t, Params, const OptionalTensor&);

struct SoftmaxHandles {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad;
  c10::TypedOperatorHandle<WithoutSecondOp> without_second, carrying;
  c10::TypedOperatorHandle<WithGradInPlaceOp> with_grad_;
  c10::TypedOperatorHandle<BackwardOp> backward;
  c10::TypedOperatorHandle<BackwardInPlaceOp> backward_;

  explicit SoftmaxHandles(const std::string& name)
      : forward(find_op(name).typed<ForwardOp>()),
        with_grad(find_op(name + "_with_grad").typed<WithGradOp>()),
        without_second(find_op(name + ".without_second").typed<WithoutSecondOp>()),
        carrying(find_op(name + ".carrying").typed<WithoutSecondOp>()),
        with_grad_(find_op(name + "_with_grad_").typed<WithGradInPlaceOp>()),
        backward(find_op(name + "_backward").typed<BackwardOp>()),
        backward_(find_op(name + "_backward_").typed<BackwardInPlaceOp>()) {}
};

namespace {

constexpr int64_t kWide = 1, kSecond = 2, kInPlace = 4;  // flags

SavedCall saved_call(const SoftmaxLoss& loss, const SoftmaxCall& call, bool in_place) {
  const int64_t flags = (call.wide ? kWide : 0) | (call.second ? kSecond : 0) | (in_place ? kInPlace : 0);
  return {loss.number, call.reduction, call.ignore_index, flags, {call.params.begin(), call.params.end()}};
}

std::tuple<Tensor, Tensor, Tensor> with_grad(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call) {
  const AlignedAsRead aligned;
  return handles_of(loss).with_grad.call(logits, call.target, call.weight, call.reduction, call.ignore_index,
                                         call.params, call.wide, call.sample_weight);
}

// In a graph an op's results are all there. In eager mode the second one is left undefined where it is not wanted:
// making it takes a tenth of a small loss.
enum class Results { All, Wanted };

std::tuple<Tensor, Tensor, Tensor> without_grad(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                                                Results results) {
  const SoftmaxHandles& ops = handles_of(loss);
  if (results == Results::All || call.second) {
    return ops.forward.call(logits, call.target, call.weight, call.reduction, call.ignore_index, call.params, call.wide,
                            call.second, call.sample_weight);
  }
  auto [value, statistics] = ops.without_second.call(logits, call.target, call.weight, call.reduction,
                                                     call.ignore_index, call.params, call.wide, call.sample_weight);
  return {std::move(value), Tensor(), std::move(statistics)};
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// What forward or the gradient saved beside the logits and statistics, but for the weights of rows.
SoftmaxCall call_of(const SavedCall& saved, const SavedTensors& tensors) {
  return {tensors[1],
          if_defined(tensors[2]),
          saved.reduction,
          saved.ignore_index,
          saved.params,
          bool(saved.flags & kWide),
          bool(saved.flags & kSecond)};
}

Tensor gradient_of(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& upstream,
                   const OptionalTensor& second, const Tensor& logits, const Tensor& statistics,
                   const GradientOfForward& of_forward) {
  if (!of_forward.made || !scales_exactly(logits, upstream)) {
    const AlignedAsRead aligned;
    return handles_of(loss).backward.call(upstream, second, logits, call.target, call.weight, statistics,
                                          call.reduction, call.ignore_index, call.params, call.sample_weight);
  }
  return scaled(of_forward, upstream, [&] { return std::get<2>(with_grad(loss, logits, call)); });
}

Tensor gradient_by_formula(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                           const Tensor& upstream, const OptionalTensor& second) {
  std::function<variable_list(const variable_list&)> formula;
  if (loss.formula) {
    formula = [&](const variable_list& x) {
      variable_list values = loss.formula(x[0], call);
      if (!second) values.resize(1);
      return values;
    };
  }
  const variable_list upstreams = second ? variable_list{upstream, *second} : variable_list{upstream};
  return differentiable_gradients(loss.op, {logits}, upstreams, formula)[0];
}

// <v, gradient for an upstream gradient of 1>, for each number of the upstream gradient.
Tensor derivative_by_upstream(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& upstream,
                              const Tensor& logits, const Tensor& statistics, const Tensor& v) {
  if (!loss.traits.reads_row) {  // linear
    return std::get<0>(handles_of(loss).forward.call(v, call.target, call.weight, call.reduction, call.ignore_index,
                                                     call.params, call.wide, false, {}));
  }
  const auto wide = [&](const Tensor& tensor) { return tensor.to(statistics.scalar_type()); };
  const OptionalTensor weight = call.weight ? OptionalTensor(wide(*call.weight)) : std::nullopt;
  const Tensor ones = at::ones(upstream.sizes(), statistics.options());
  const Tensor products =
      handles_of(loss)
          .backward
          .call(ones, std::nullopt, wide(logits), loss.traits.soft ? wide(call.target) : call.target, weight,
                statistics, call.reduction, call.ignore_index, call.params, {})
          .mul_(v);
  const Tensor sums = call.reduction == kNone ? products.sum(class_dim(logits)) : products.sum();
  return sums.to(upstream.scalar_type());
}

// The derivative of the gradient as a function of its own, where it is known: of the upstream gradient and the logits.
variable_list differentiate_gradient(Kept& kept, const variable_list& upstreams) {
  variable_list gradients(2);
  const Tensor& v = upstreams[0];
  if (!v.defined()) return gradients;
  const SoftmaxLoss& loss = softmax_loss(kept.call.loss);
  const SavedTensors tensors = kept.tensors();
  const Tensor &logits = tensors[0], &statistics = tensors[3], &upstream = tensors[4];
  const SoftmaxCall call = call_of(kept.call, tensors);
  if (at::GradMode::is_enabled() || needs_formula({v, upstream})) {
    const auto formula = [&](const variable_list& x) {
      return variable_list{gradient_by_formula(loss, x[1], call, x[0], std::nullopt)};
    };
    return differentiable_gradients(loss.op, {upstream, logits}, {v}, formula);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (kept.wants(0)) gradients[0] = derivative_by_upstream(loss, call, upstream, logits, statistics, v);
  if (kept.wants(1)) gradients[1] = second_derivative(loss, call, upstream, logits, statistics, v);
  return gradients;
}

// That of a loss which is linear in its logits, whose upstream gradient requires none.
variable_list differentiate_constant(Kept&, const variable_list& upstreams) {
  const Tensor& v = upstreams[0];
  return {Tensor(), v.defined() ? at::zeros_like(v) : Tensor()};
}

constexpr Backward kGradientBackward = {"SoftmaxGradientBackward", false, &differentiate_gradient};
constexpr Backward kConstantBackward = {"ConstantGradientBackward", false, &differentiate_constant};

Tensor differentiable_gradient(const SavedCall& saved, const SoftmaxLoss& loss, const SoftmaxCall& call,
                               const Tensor& upstream, const Tensor& logits, const Tensor& statistics,
                               const GradientOfForward& of_forward) {
  Tensor gradient;
  {
    const BelowAutograd guard;
    gradient = gradient_of(loss, call, upstream, std::nullopt, logits, statistics, of_forward);
  }
  if (loss.traits.reads_row || upstream.requires_grad()) {
    differentiate(kGradientBackward, saved, {}, {&upstream, &logits},
                  {&logits, &call.target, pointer_to(call.weight), &statistics, &upstream}, {&gradient});
  } else {
    differentiate(kConstantBackward, saved, {}, {&upstream, &logits}, {}, {&gradient});
  }
  return gradient;
}

Tensor gradient_in_place(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                         const Tensor& statistics, const Tensor& upstream, const OptionalTensor& second) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (statistics.defined()) {
    handles_of(loss).backward_.call(upstream, second, logits, call.target, call.weight, statistics, call.reduction,
                                    call.ignore_index, call.params, call.sample_weight);
  } else {
    scale_(logits, upstream);
  }
  logits.unsafeGetTensorImpl()->bump_version();  // a second backward is refused, with torch's own words
  return logits.detach();
}

variable_list backward(Kept& kept, const variable_list& upstreams) {
  const GradientOfForward of_forward = take_gradient(kept, upstreams[0]);
  const bool batched = needs_formula({upstreams[0], upstreams.size() > 1 ? upstreams[1] : Tensor()});
  const bool differentiable = at::GradMode::is_enabled() || batched;
  if (!differentiable && of_forward.left.defined() && scales_exactly(of_forward.left, upstreams[0])) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return {scaled(of_forward.left, upstreams[0])};
  }
  const SavedCall& saved = kept.call;
  const SoftmaxLoss& loss = softmax_loss(saved.loss);
  const SavedTensors tensors = kept.tensors();
  const Tensor &logits = tensors[0], &statistics = tensors[3];
  SoftmaxCall call = call_of(saved, tensors);
  call.sample_weight = if_defined(tensors[4]);
  Tensor upstream = upstreams[0];
  const OptionalTensor second = call.second && upstreams[1].defined() ? OptionalTensor(upstreams[1]) : std::nullopt;
  if (!upstream.defined()) {
    if (!second) return variable_list(1);
    upstream =
        at::zeros_symint(call.reduction == kNone ? second->sym_sizes() : c10::SymIntArrayRef(), second->options());
  }
  if (saved.flags & kInPlace) {
    TORCH_CHECK(!at::GradMode::is_enabled(), loss.op,
                ": inplace=True overwrites the logits, so that backward cannot be differentiated itself "
                "(create_graph=True)");
    TORCH_CHECK(!batched, loss.op, ": inplace=True has room for one gradient, got a batch of upstream gradients");
    return {gradient_in_place(loss, logits, call, statistics, upstream, second)};
  }
  if (!differentiable) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return {gradient_of(loss, call, upstream, second, logits, statistics, of_forward)};
  }
  if (!batched && !second && !is_traced(upstream) && has_second_derivative(loss, call))
    return {differentiable_gradient(saved, loss, call, upstream, logits, statistics, of_forward)};
  return {gradient_by_formula(loss, logits, call, upstream, second)};
}

constexpr Backward kBackward = {"SoftmaxBackward", true, &backward, [](int64_t loss) { return softmax_loss(loss).op; }};

// Returns the loss, the second result, the statistics.
std::tuple<Tensor, Tensor, Tensor> differentiable_loss(const SoftmaxLoss& loss, const Tensor& logits,
                                                       const SoftmaxCall& call, Results results, GradientIn gradient,
                                                       bool in_place) {
  Tensor value, second, statistics;
  GradientOfForward of_forward;
  const bool overwrites = in_place && gradient == GradientIn::Forward;
  {
    const BelowAutograd guard;
    if (overwrites) {
      std::tie(value, statistics) =
          handles_of(loss).with_grad_.call(logits, call.target, call.weight, call.reduction, call.ignore_index,
                                           call.params, call.wide, call.sample_weight);
      logits.unsafeGetTensorImpl()->bump_version();
    } else if (gradient == GradientIn::Forward) {
      of_forward.made = true;
      std::tie(value, statistics, of_forward.left) = with_grad(loss, logits, call);
    } else if (gradient == GradientIn::Carried) {
      std::tie(value, statistics) =
          handles_of(loss).carrying.call(logits, call.target, call.weight, call.reduction, call.ignore_index,
                                         call.params, call.wide, call.sample_weight);
    } else {
      std::tie(value, second, statistics) = without_grad(loss, logits, call, results);
    }
  }
  // Logits are saved as they are now, so that a change before backward is noticed like any other. Overwritten ones
  // are the gradient, and all that backward needs.
  const std::array<const Tensor*, 5> saved = {&logits, &call.target, pointer_to(call.weight), &statistics,
                                              pointer_to(call.sample_weight)};
  const std::array<const Tensor*, 2> functions = {&value, &second};
  differentiate(kBackward, saved_call(loss, call, in_place), std::move(of_forward), {&logits},
                {saved.data(), overwrites ? 1 : saved.size()}, {functions.data(), call.second ? size_t(2) : 1});
  return {std::move(value), std::move(second), std::move(statistics)};
}

std::tuple<Tensor, Tensor, Tensor> with_statistics(const SoftmaxLoss& loss, const Tensor& logits,
                                                   const SoftmaxCall& call, Results results, GradientIn gradient,
                                                   bool in_place) {
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return without_grad(loss, logits, call, results);
  }
  if (in_place) {
    torch::autograd::check_inplace(logits, true);
    check_overwritten(logits, {&call.target, pointer_to(call.weight), pointer_to(call.sample_weight)});
  }
  if (call.second || !loss.traits.reads_row || !may_make_gradient_in_forward(logits, call.reduction))
    gradient = GradientIn::Backward;
  return differentiable_loss(loss, logits, call, results, gradient, in_place);
}

// The native formula in the shape of the op's results; its backward needs no statistics, which are zeros.
std::tuple<Tensor, Tensor, Tensor> native(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call) {
  const variable_list values = loss.formula(logits, call);
  const c10::SymInt rows = logits.sym_numel() / logits.sym_size(class_dim(logits));
  return {values[0], call.second ? values[1] : Tensor(),
          at::zeros_symint({rows * loss.saved_statistics(call.params) + 1},
                           logits.options().dtype(arithmetic_type(logits.scalar_type())))};
}

}  // namespace

std::tuple<Tensor, Tensor> softmax(const SoftmaxLoss& loss, const Tensor& logits, const SoftmaxCall& call,
                                   std::optional<bool> grad_in_forward, bool in_place) {
  const bool in_graph = recorded();
  if (in_graph) {
    grad_in_forward = false;
    in_place = false;
  }
  const bool in_forward = grad_in_forward.value_or(!in_place && device_for(logits).row_gradient_in_forward_pays &&
                                                   gradient_in_forward_pays(logits, call.reduction)) &&
                          !(in_place && under_saved_tensor_hooks());  // one may raise: nothing is overwritten yet
  auto [value, second, statistics] = with_statistics(loss, logits, call, in_graph ? Results::All : Results::Wanted,
                                                     in_forward ? GradientIn::Forward : GradientIn::Backward, in_place);
  return {std::move(value), std::move(second)};
}

void define_softmax(torch::Library& m, const SoftmaxLoss& loss) {
  const std::string name = base_name(loss.op);
  const std::string forward =
      "Tensor target, Tensor? weight, int reduction, int ignore_index, float[] params, bool wide=False";
  const std::string backward =
      "Tensor target, Tensor? weight, Tensor statistics, int reduction, int ignore_index, float[] params, "
      "Tensor? sample_weight=None)";
  const std::string last = ", Tensor? sample_weight=None) -> ";
  const auto define = [&](const std::string& schema) { m.def((name + schema).c_str()); };
  define("(Tensor logits, " + forward + ", bool second=False" + last +
         "(Tensor loss, Tensor second, Tensor statistics)");
  define("_with_grad(Tensor logits, " + forward + last + "(Tensor loss, Tensor statistics, Tensor grad)");
  define(".without_second(Tensor logits, " + forward + last + "(Tensor loss, Tensor statistics)");
  define(".carrying(Tensor logits, " + forward + last + "(Tensor loss, Tensor statistics)");
  define("_with_grad_(Tensor(a!) logits, " + forward + last + "(Tensor loss, Tensor statistics)");
  define("_backward(Tensor upstream, Tensor? upstream_second, Tensor logits, " + backward + " -> Tensor");
  define("_backward_(Tensor upstream, Tensor? upstream_second, Tensor(a!) logits, " + backward + " -> ()");
}

void implement_softmax_under_autograd(torch::Library& m, const SoftmaxLoss& loss) {
  m.impl(base_name(loss.op).c_str(), [&loss](const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             int64_t reduction, int64_t ignore_index, Params params, bool wide,
                                             bool second, const OptionalTensor& sample_weight) {
    const SoftmaxCall call = {target, weight, reduction, ignore_index, params, wide, second, sample_weight};
    const bool carries = device_for(logits).row_gradient_in_forward_pays && gradient_in_forward_pays(logits, reduction);
    const GradientIn gradient = carries ? GradientIn::Carried : GradientIn::Backward;
    auto results = needs_formula({logits, target, weight, sample_weight})
                       ? native(loss, logits, call)
                       : with_statistics(loss, logits, call, Results::All, gradient, false);
    Tensor& of_second = std::get<1>(results);
    if (!of_second.defined()) of_second = at::empty({0}, std::get<0>(results).options());
    return results;
  });
  for (const char* suffix : {"_with_grad", ".without_second", ".carrying", "_backward"})
    refuse_derivatives(m, loss.op + suffix);
}

}  // namespace fusedloss
