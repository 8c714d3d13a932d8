// The pointwise family under autograd.

#include <ATen/ExpandUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/sum.h>

#include "second_derivatives.h"

namespace fusedloss {

using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params, const OptionalTensor&,
                         bool, std::optional<int64_t>);
using WithGradOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params,
                                              const OptionalTensor&, bool, std::optional<int64_t>);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params,
                          const OptionalTensor&, bool, std::optional<int64_t>, bool, const OptionalTensor&, bool, bool);

struct PointwiseHandles {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad, carrying;
  c10::TypedOperatorHandle<BackwardOp> backward;

  explicit PointwiseHandles(const std::string& op)
      : forward(find_op(op).typed<ForwardOp>()),
        with_grad(find_op(op + "_with_grad").typed<WithGradOp>()),
        carrying(find_op(op + ".carrying").typed<WithGradOp>()),
        backward(find_op(op + "_backward").typed<BackwardOp>()) {}
};

namespace {

constexpr int64_t kWide = 1, kIgnores = 2, kMirrored = 4, kHasThird = 8;  // flags

// Whether the call has a third operand that may have a gradient.
bool has_third(const PointwiseLoss& loss, const PointwiseCall& call) {
  return loss.traits.has_third_slope && call.third.has_value();
}

bool differentiates(const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

// Sizes that a compiler keeps open differ only where it can say so without the data.
bool differ(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  if (a.size() != b.size()) return true;
  for (size_t d = 0; d < a.size(); ++d) {
    const bool known = !a[d].is_symbolic() && !b[d].is_symbolic();
    if (known ? a[d] != b[d] : TORCH_GUARD_OR_FALSE(a[d].sym_ne(b[d]))) return true;
  }
  return false;
}

// The input as the kernels read it, of the size that the operands broadcast to: the same tensor where it has that size.
Tensor input_as_read(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call) {
  Tensor read = input;
  if (!call.ignore_index && differ(read.sym_sizes(), target.sym_sizes()))
    read = read.expand_symint(at::infer_size_symdimvector(read.sym_sizes(), target.sym_sizes()));
  if (has_third(loss, call) && differ(read.sym_sizes(), call.third->sym_sizes()))
    read = read.expand_symint(at::infer_size_symdimvector(read.sym_sizes(), call.third->sym_sizes()));
  return read;
}

// kMirrored: the gradient to the target is that to the input, negated.
SavedCall saved_call(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call) {
  const bool mirrored = loss.traits.of_difference && target.scalar_type() == input.scalar_type() &&
                        !differ(target.sym_sizes(), input.sym_sizes());
  const int64_t flags = (call.wide ? kWide : 0) | (call.ignore_index ? kIgnores : 0) | (mirrored ? kMirrored : 0) |
                        (has_third(loss, call) ? kHasThird : 0);
  return {loss.number, call.reduction, call.ignore_index.value_or(0), flags, {call.params.begin(), call.params.end()}};
}

std::tuple<Tensor, Tensor> with_grad(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                                     const PointwiseCall& call) {
  const AlignedAsRead aligned;
  return handles_of(loss).with_grad.call(input, target, call.weight, call.reduction, call.params, call.third, call.wide,
                                         call.ignore_index);
}

Tensor backward_of(const PointwiseLoss& loss, const Tensor& upstream, const Tensor& input, const Tensor& target,
                   const PointwiseCall& call, Of of, const OptionalTensor& carrier, bool unrounded = false) {
  const AlignedAsRead aligned;
  return handles_of(loss).backward.call(upstream, input, target, call.weight, call.reduction, call.params, call.third,
                                        call.wide, call.ignore_index, of == Of::Target, carrier, of == Of::Third,
                                        unrounded);
}

Tensor native(const PointwiseLoss& loss, const Tensor& input, const Tensor& target, const PointwiseCall& call) {
  if (!call.wide) return loss.formula(input, target, call);
  PointwiseCall widened = call;
  widened.wide = false;
  for (OptionalTensor* factor : {&widened.weight, &widened.third}) {
    if (*factor) *factor = (*factor)->to(at::kFloat);
  }
  return loss.formula(input.to(at::kFloat), target.is_floating_point() ? target.to(at::kFloat) : target, widened);
}

// What forward or the gradient saved: the call, its tensors standing after the first `given` ones.
PointwiseCall call_of(const SavedCall& saved, const SavedTensors& tensors, size_t given) {
  PointwiseCall call = {{}, {}, saved.reduction, saved.params, bool(saved.flags & kWide), {}};
  if (tensors[given].defined()) call.weight = tensors[given];
  if (tensors[given + 1].defined()) call.third = tensors[given + 1];
  if (saved.flags & kIgnores) call.ignore_index = saved.ignore_index;
  return call;
}

variable_list by_formula(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& upstream,
                         const Tensor& input, const Tensor& target) {
  variable_list operands = {input, target};
  if (has_third(loss, call)) operands.push_back(*call.third);
  std::function<variable_list(const variable_list&)> formula;
  if (loss.formula) {
    formula = [&](const variable_list& x) {
      PointwiseCall of_views = call;
      if (x.size() == 3) of_views.third = x[2];
      return variable_list{native(loss, x[0], x[1], of_views)};
    };
  }
  return differentiable_gradients(loss.op, operands, {upstream}, formula);
}

Tensor gradient_by_input(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& upstream,
                         const Tensor& input, const Tensor& target, const GradientOfForward& of_forward,
                         const OptionalTensor& carrier) {
  if (!of_forward.made || !scales_exactly(input, upstream)) {
    return backward_of(loss, upstream, input, target, call, Of::Input, carrier);
  }
  return scaled(of_forward, upstream, [&] { return std::get<1>(with_grad(loss, input, target, call)); });
}

// <v, gradient by the input for an upstream gradient of 1>, for each number of the upstream gradient. Half precision
// would not hold it before it is divided.
Tensor derivative_by_upstream(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& upstream,
                              const Tensor& input, const Tensor& target, const Tensor& v) {
  PointwiseCall each = call;
  each.reduction = kNone;
  const auto wide = [](const Tensor& tensor) { return tensor.to(arithmetic_type(tensor.scalar_type())); };
  for (OptionalTensor* factor : {&each.weight, &each.third}) {
    if (*factor) *factor = wide(**factor);
  }
  each.wide = false;
  const Tensor x = wide(input), t = wide(target);
  Tensor products = backward_of(loss, v.to(arithmetic_type(upstream.scalar_type())), x, t, each, Of::Input, {});
  if (call.reduction == kMean) products = products.sum().div_(double(input.numel()));
  if (call.reduction == kSum) products = products.sum();
  return products.to(upstream.scalar_type());
}

// The derivative of the gradient by the input as a function of its own, where it is known: of the upstream gradient,
// the input and the target.
variable_list differentiate_gradient(Kept& kept, const variable_list& upstreams) {
  variable_list gradients(3);
  const Tensor& v = upstreams[0];
  if (!v.defined()) return gradients;
  const SavedTensors tensors = kept.tensors();
  const Tensor &upstream = tensors[0], &input = tensors[1], &target = tensors[2];
  const PointwiseLoss& loss = pointwise_loss(kept.call.loss);
  const PointwiseCall call = call_of(kept.call, tensors, 3);
  if (at::GradMode::is_enabled() || needs_formula({v, upstream})) {
    const auto formula = [&](const variable_list& x) {
      const variable_list found = by_formula(loss, call, x[0], x[1], x[2]);
      return variable_list{found[0].defined() ? found[0] : found[1].neg()};
    };
    return differentiable_gradients(loss.op, {upstream, input, target}, {v}, formula);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (kept.wants(0)) gradients[0] = derivative_by_upstream(loss, call, upstream, input, target, v);
  const bool of_target = kept.wants(2);
  if (!kept.wants(1) && !of_target) return gradients;
  const Tensor second = second_derivative(loss, call, upstream, input, target, v);
  if (of_target) gradients[2] = second.neg();  // of a difference: no other loss comes here
  if (kept.wants(1)) gradients[1] = second;
  return gradients;
}

constexpr Backward kGradientBackward = {"PointwiseGradientBackward", false, &differentiate_gradient};

Tensor differentiable_gradient(const SavedCall& saved, const PointwiseLoss& loss, const PointwiseCall& call,
                               const Tensor& upstream, const Tensor& input, const Tensor& target,
                               const GradientOfForward& of_forward) {
  Tensor gradient;
  {
    const BelowAutograd guard;
    gradient = gradient_by_input(loss, call, upstream, input, target, of_forward, {});
  }
  differentiate(kGradientBackward, saved, {}, {&upstream, &input, &target},
                {&upstream, &input, &target, pointer_to(call.weight), pointer_to(call.third)}, {&gradient});
  return gradient;
}

// The gradient to one operand. One that broadcasts gets a sum, of numbers that are not rounded to a half type.
Tensor gradient_by(const PointwiseLoss& loss, const Tensor& upstream, const Tensor& input, const Tensor& target,
                   const PointwiseCall& call, Of of, const Tensor& operand) {
  if (!differ(operand.sym_sizes(), input.sym_sizes())) return backward_of(loss, upstream, input, target, call, of, {});
  const Tensor gradients = backward_of(loss, upstream, input, target, call, of, {}, /*unrounded=*/true);
  return at::sum_to(gradients, operand.sym_sizes()).to(operand.scalar_type());
}

variable_list backward(Kept& kept, const variable_list& upstreams) {
  const Tensor& upstream = upstreams[0];
  const GradientOfForward of_forward = take_gradient(kept, upstream);
  const SavedCall& saved = kept.call;
  variable_list gradients(saved.flags & kHasThird ? 3 : 2);
  if (!upstream.defined()) return gradients;
  const bool of_input = kept.wants(0), of_target = kept.wants(1), of_third = gradients.size() == 3 && kept.wants(2);
  const bool mirrored = saved.flags & kMirrored;
  const bool batched = needs_formula({upstream}), differentiable = at::GradMode::is_enabled() || batched;
  const auto mirror = [&](const Tensor& gradient) {
    if (of_target) gradients[1] = gradient.neg();
    if (of_input) gradients[0] = gradient;
    return gradients;
  };
  if (!differentiable && of_forward.left.defined() && (mirrored || !of_target) && !of_third &&
      scales_exactly(of_forward.left, upstream)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return mirror(scaled(of_forward.left, upstream));
  }
  const SavedTensors tensors = kept.tensors();
  const Tensor &given = tensors[0], &target = tensors[1];
  const PointwiseLoss& loss = pointwise_loss(saved.loss);
  const PointwiseCall call = call_of(saved, tensors, 2);
  const OptionalTensor carrier = tensors[4].defined() ? OptionalTensor(tensors[4]) : std::nullopt;
  const Tensor input = input_as_read(loss, given, target, call);
  const bool sums_input = !input.is_same(given);
  if (differentiable) {
    if (!batched && !is_traced(upstream) && !sums_input && (mirrored || !of_target) &&
        has_second_derivative(loss, call))
      return mirror(differentiable_gradient(saved, loss, call, upstream, input, target, of_forward));
    return by_formula(loss, call, upstream, given, target);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (of_third) gradients[2] = gradient_by(loss, upstream, input, target, call, Of::Third, *call.third);
  if (of_input && sums_input) {
    gradients[0] = gradient_by(loss, upstream, input, target, call, Of::Input, given);
  } else if (of_input || (mirrored && of_forward.made)) {
    const Tensor gradient = gradient_by_input(loss, call, upstream, input, target, of_forward, carrier);
    if (mirrored) return mirror(gradient);
    gradients[0] = gradient;
  }
  if (of_target) gradients[1] = gradient_by(loss, upstream, input, target, call, Of::Target, target);
  return gradients;
}

constexpr Backward kBackward = {"PointwiseBackward", true, &backward,
                                [](int64_t loss) { return pointwise_loss(loss).op; }};

Tensor differentiable_loss(const PointwiseLoss& loss, const Tensor& input, const Tensor& target,
                           const PointwiseCall& call, GradientIn gradient) {
  Tensor value, carrier;
  GradientOfForward of_forward;
  {
    const BelowAutograd guard;
    if (gradient == GradientIn::Backward) {
      value = handles_of(loss).forward.call(input_as_read(loss, input, target, call), target, call.weight,
                                            call.reduction, call.params, call.third, call.wide, call.ignore_index);
    } else if (gradient == GradientIn::Forward) {
      of_forward.made = true;
      std::tie(value, of_forward.left) = with_grad(loss, input, target, call);
    } else {
      std::tie(value, carrier) = handles_of(loss).carrying.call(input, target, call.weight, call.reduction, call.params,
                                                                call.third, call.wide, call.ignore_index);
    }
  }
  c10::SmallVector<const Tensor*, 3> operands = {&input, &target};
  if (has_third(loss, call)) operands.push_back(&*call.third);
  differentiate(kBackward, saved_call(loss, input, target, call), std::move(of_forward), operands,
                {&input, &target, pointer_to(call.weight), pointer_to(call.third), &carrier}, {&value});
  return value;
}

}  // namespace

Tensor pointwise(const PointwiseLoss& loss, const Tensor& input_, const Tensor& target_, const PointwiseCall& call,
                 GradientIn gradient) {
  Tensor input = input_, target = target_;
  // A gradient in a half type that is a sum is summed by the backward here: expand's would sum rounded numbers.
  const auto sums = [](const Tensor& operand) { return differentiates(operand) && is_half(operand.scalar_type()); };
  const Tensor read = input_as_read(loss, input, target, call);
  const bool sums_input = !read.is_same(input) && sums(input);
  if (!sums_input) input = read;
  if (!call.ignore_index) {
    if (!sums(target) && differ(target.sym_sizes(), read.sym_sizes())) target = target.expand_symint(read.sym_sizes());
    if (at::isIntegralType(target.scalar_type(), false)) {
      target = target.to(call.wide ? at::kFloat : input.scalar_type());
    }
  }
  if (differentiates(input) || differentiates(target) || (has_third(loss, call) && differentiates(*call.third))) {
    TORCH_CHECK(!target.requires_grad() || has_gradient(loss, Of::Target), loss.op,
                " is not differentiable with respect to its target");
    // With a reduction, a gradient in forward costs hardly more than the sum alone on a CPU. On a GPU it moves 3
    // elements where forward and backward apart move 5, and as many as they do where the upstream gradient is not 1.
    const bool pays =
        input.requires_grad() && !sums_input && gradient_in_forward_pays(input, call.reduction) &&
        (!(call.ignore_index || gradient == GradientIn::Carried) || device_for(input).row_gradient_in_forward_pays);
    return differentiable_loss(loss, input, target, call, pays ? gradient : GradientIn::Backward);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return handles_of(loss).forward.call(input, target, call.weight, call.reduction, call.params, call.third, call.wide,
                                       call.ignore_index);
}

void define_pointwise(torch::Library& m, const PointwiseLoss& loss) {
  const std::string name = base_name(loss.op);
  const std::string third = loss.traits.has_third_slope ? "third" : "pos_weight";
  const std::string arguments = "Tensor input, Tensor target, Tensor? weight, int reduction, float[] params, Tensor? " +
                                third + "=None, bool wide=False, int? ignore_index=None";
  m.def((name + "(" + arguments + ") -> Tensor").c_str());
  m.def((name + "_with_grad(" + arguments + ") -> (Tensor loss, Tensor grad)").c_str());
  m.def((name + ".carrying(" + arguments + ") -> (Tensor loss, Tensor carrier)").c_str());
  const std::string of_backward =
      ", bool of_target=False, Tensor? carrier=None, bool of_third=False, bool unrounded=False) -> Tensor";
  m.def((name + "_backward(Tensor upstream, " + arguments + of_backward).c_str());
}

void implement_pointwise_under_autograd(torch::Library& m, const PointwiseLoss& loss) {
  m.impl(base_name(loss.op).c_str(),
         [&loss](const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 Params params, const OptionalTensor& third, bool wide, std::optional<int64_t> ignore_index) {
           const PointwiseCall call = {weight, third, reduction, params, wide, ignore_index};
           if (needs_formula({input, target, weight, third})) return native(loss, input, target, call);
           return pointwise(loss, input, target, call, GradientIn::Carried);
         });
  for (const char* suffix : {"_with_grad", ".carrying", "_backward"}) refuse_derivatives(m, loss.op + suffix);
}

}  // namespace fusedloss
