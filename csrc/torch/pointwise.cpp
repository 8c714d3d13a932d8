// The pointwise family in torch: schemas, checks, autograd.

#include "pointwise.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace fusedloss {
namespace {

struct Traits {
  bool of_difference, valid;
};

Traits traits_of(Pointwise loss, Params given) {
  double params[kMaxParams];
  copy_params(given, params);
  switch (loss) {
#define FUSEDLOSS_TRAITS(name, Functor) \
  case Pointwise::name:                 \
    return {baseline::Functor<double>::of_difference, baseline::Functor<double>::valid(params)};
    FUSEDLOSS_POINTWISE(FUSEDLOSS_TRAITS)
#undef FUSEDLOSS_TRAITS
  }
  TORCH_CHECK(false, "unknown pointwise loss ", int64_t(loss));
}

bool same_dense_order(const Tensor& a, const Tensor& b) {
  return a.is_contiguous() ? b.is_contiguous() : a.strides() == b.strides() && a.is_non_overlapping_and_dense();
}

}  // namespace

PointwiseInputs::PointwiseInputs(Pointwise loss, const Tensor& input_, const Tensor& target_,
                                 const OptionalTensor& weight_, Params params_)
    : input(input_), target(target_), weight(weight_), params(params_) {
  const char* name = name_of(loss);
  TORCH_CHECK(kernel_dtype(input.scalar_type()), name, ": expected a floating point input, got ", input.scalar_type());
  TORCH_CHECK(traits_of(loss, params).valid, name, ": parameters out of range: ", params);
  if (!input.is_non_overlapping_and_dense()) input = input.clone();  // dense, in the order empty_like gives
  check_device(name, "a target", target, input);
  if (weight) check_device(name, "a weight", *weight, input);
  align(target, "target", name);
  if (weight) align(*weight, "weight", name);
}

void PointwiseInputs::align(Tensor& other, const char* what, const char* name) const {
  TORCH_CHECK(other.sizes() == input.sizes(), name, ": expected ", what, " of the input's size ", input.sizes(),
              ", got ", other.sizes());
  TORCH_CHECK(other.scalar_type() == input.scalar_type(), name, ": expected ", what, " of the input's dtype ",
              input.scalar_type(), ", got ", other.scalar_type());
  if (!same_dense_order(input, other)) other = at::empty_like(input).copy_(other);
}

void PointwiseInputs::fill(PointwiseArgs& args) const {
  args.dtype = *kernel_dtype(input.scalar_type());
  args.input = input.const_data_ptr();
  args.target = target.const_data_ptr();
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  copy_params(params, args.params);
}

void check_backward(Pointwise loss, const PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction) {
  TORCH_CHECK(upstream.scalar_type() == inputs.input.scalar_type(), name_of(loss),
              "_backward: expected an upstream gradient of ", inputs.input.scalar_type(), ", got ",
              upstream.scalar_type());
  check_device(name_of(loss), "an upstream gradient", upstream, inputs.input);
  TORCH_CHECK(upstream.sizes() == (reduction == kNone ? inputs.input.sizes() : at::IntArrayRef()), name_of(loss),
              "_backward: the upstream gradient's size ", upstream.sizes(), " does not fit the loss");
}

namespace {

using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params);
using WithGradOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params);

struct Ops {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad;
  c10::TypedOperatorHandle<BackwardOp> backward;

  explicit Ops(const std::string& name)
      : forward(find_op(name).typed<ForwardOp>()),
        with_grad(find_op(name + "_with_grad").typed<WithGradOp>()),
        backward(find_op(name + "_backward").typed<BackwardOp>()) {}
};

const Ops& ops_of(Pointwise loss) {
  static const std::vector<Ops> ops(std::begin(kPointwiseNames), std::end(kPointwiseNames));
  return ops[size_t(loss)];
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Gradients that carry a graph of their own: native autograd through the native formula.
variable_list differentiable_gradients(Pointwise loss, const Tensor& upstream, const Tensor& input,
                                       const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                                       Params params) {
  const PointwiseFormula& formula = native_formula(loss);
  TORCH_CHECK(formula, name_of(loss), ": no native formula to differentiate twice");
  // Views, so that a target computed from the input does not count twice.
  const Tensor x = input.view_as(input), t = target.view_as(target);
  const Tensor value = formula(x, t, weight, reduction, params);
  variable_list wanted, gradients(2);
  if (x.requires_grad()) wanted.push_back(x);
  if (t.requires_grad()) wanted.push_back(t);
  const variable_list found = torch::autograd::grad({value}, wanted, {upstream}, true, true, true);
  size_t next = 0;
  if (x.requires_grad()) gradients[0] = found[next++];
  if (t.requires_grad()) gradients[1] = found[next++];
  return gradients;
}

// On a GPU a gradient in forward moves 3 elements where forward and backward apart move 5, and as many as they do where
// the upstream gradient is not 1.
bool pays_in_forward(const Tensor& input, int64_t reduction) {
  return input.is_cuda() && may_make_gradient_in_forward(input, reduction);
}

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction> {
  static Tensor forward(AutogradContext* ctx, int64_t loss, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, int64_t reduction, Params params, bool grad_in_forward) {
    ctx->save_for_backward({input, target, weight.value_or(Tensor())});
    ctx->saved_data["loss"] = loss;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["params"] = params.vec();
    at::AutoDispatchBelowADInplaceOrView guard;
    const Ops& ops = ops_of(Pointwise(loss));
    if (!grad_in_forward || !pays_in_forward(input, reduction))
      return ops.forward.call(input, target, weight, reduction, params);
    auto [value, grad] = ops.with_grad.call(input, target, weight, reduction, params);
    ctx->saved_data["grad"] = grad;
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const auto loss = Pointwise(ctx->saved_data["loss"].toInt());
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const std::vector<double> params = ctx->saved_data["params"].toDoubleVector();
    variable_list gradients(7);  // one for each argument of forward
    if (!upstream[0].defined()) return gradients;
    if (at::GradMode::is_enabled()) {
      const variable_list found = differentiable_gradients(loss, upstream[0], input, target, weight, reduction, params);
      gradients[1] = found[0];
      gradients[2] = found[1];
    } else {
      Tensor grad = take_grad(ctx);
      grad = grad.defined() ? scale_(grad, upstream[0])
                            : ops_of(loss).backward.call(upstream[0], input, target, weight, reduction, params);
      if (ctx->needs_input_grad(1)) gradients[2] = grad.neg();
      if (ctx->needs_input_grad(0)) gradients[1] = std::move(grad);
    }
    return gradients;
  }
};

bool wants_grad(const Tensor& input, const Tensor& target) {
  return at::GradMode::is_enabled() && (input.requires_grad() || target.requires_grad());
}

}  // namespace

bool owns_pointwise(Pointwise loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    Params params) {
  const Traits traits = traits_of(loss, params);
  const auto fits = [&](const Tensor& other) {
    return other.scalar_type() == input.scalar_type() && other.sizes() == input.sizes() &&
           same_dense_order(input, other);
  };
  return traits.valid && kernel_dtype(input.scalar_type()) && input.numel() > 0 && fits(target) &&
         input.is_non_overlapping_and_dense() && (!target.requires_grad() || traits.of_difference) &&
         (!weight || (fits(*weight) && !weight->requires_grad()));
}

Tensor pointwise_loss(Pointwise loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                      int64_t reduction, Params params, bool grad_in_forward) {
  if (wants_grad(input, target)) {
    TORCH_CHECK(!target.requires_grad() || traits_of(loss, params).of_difference, name_of(loss),
                " is not differentiable with respect to its target");
    return PointwiseFunction::apply(int64_t(loss), input, target, weight, reduction, params, grad_in_forward);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops_of(loss).forward.call(input, target, weight, reduction, params);
}

namespace {

template <Pointwise kLoss>
Tensor autograd_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        Params params) {
  // A captured graph keeps forward and backward apart: it has no use for a gradient left in between.
  return pointwise_loss(kLoss, input, target, weight, reduction, params, false);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_ARGUMENTS "(Tensor input, Tensor target, Tensor? weight, int reduction, float[] params)"
#define FUSEDLOSS_DEFINE(name, Functor)                                                           \
  m.def(#name FUSEDLOSS_ARGUMENTS " -> Tensor");                                                  \
  m.def(#name "_with_grad" FUSEDLOSS_ARGUMENTS " -> (Tensor loss, Tensor grad)");                 \
  m.def(#name                                                                                     \
        "_backward(Tensor upstream, Tensor input, Tensor target, Tensor? weight, int reduction, " \
        "float[] params) -> Tensor");
#define FUSEDLOSS_AUTOGRAD(name, Functor) m.impl(#name, &fusedloss::autograd_forward<fusedloss::Pointwise::name>);

TORCH_LIBRARY_FRAGMENT(fusedloss, m){FUSEDLOSS_POINTWISE(FUSEDLOSS_DEFINE)} TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  FUSEDLOSS_POINTWISE(FUSEDLOSS_AUTOGRAD)
}
