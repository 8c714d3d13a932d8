// The pointwise family in torch: schemas, checks, allocation, autograd.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "common.h"

namespace fusedloss {
namespace {

constexpr int64_t kChunk = 16384;       // elements summed on their own: part of the result, not of the machine
constexpr int64_t kGrain = 4 * kChunk;  // elements worth waking a thread for

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

// The inputs of an op as dense tensors of one order. Under torch.compile they may arrive in any layout.
struct Inputs {
  Tensor input, target;
  OptionalTensor weight;

  Inputs(Pointwise loss, const Tensor& input_, const Tensor& target_, const OptionalTensor& weight_, Params params)
      : input(input_), target(target_), weight(weight_) {
    const char* name = name_of(loss);
    TORCH_CHECK(kernel_dtype(input.scalar_type()), name, ": expected a floating point input, got ",
                input.scalar_type());
    TORCH_CHECK(traits_of(loss, params).valid, name, ": parameters out of range: ", params);
    if (!input.is_non_overlapping_and_dense()) input = input.clone();  // dense, in the order empty_like gives
    align(target, "target", name);
    if (weight) align(*weight, "weight", name);
  }

  PointwiseArgs args(Params params) const {
    PointwiseArgs args = {};
    args.dtype = *kernel_dtype(input.scalar_type());
    args.input = input.const_data_ptr();
    args.target = target.const_data_ptr();
    args.weight = weight ? weight->const_data_ptr() : nullptr;
    copy_params(params, args.params);
    return args;
  }

 private:
  void align(Tensor& other, const char* what, const char* name) const {
    TORCH_CHECK(other.sizes() == input.sizes(), name, ": expected ", what, " of the input's size ", input.sizes(),
                ", got ", other.sizes());
    TORCH_CHECK(other.scalar_type() == input.scalar_type(), name, ": expected ", what, " of the input's dtype ",
                input.scalar_type(), ", got ", other.scalar_type());
    if (!same_dense_order(input, other)) other = at::empty_like(input).copy_(other);
  }
};

Tensor forward(Pointwise loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
               int64_t reduction, Params params) {
  const Inputs inputs(loss, input, target, weight, params);
  PointwiseArgs args = inputs.args(params);
  const int64_t n = inputs.input.numel();
  const CpuKernels& kernels = cpu_kernels();

  if (reduction == kNone) {
    Tensor losses = at::empty_like(inputs.input);
    args.output = losses.mutable_data_ptr();
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { kernels.pointwise_losses(loss, args, begin, end); });
    return losses;
  }
  double sum = 0;
  if (n <= kChunk) {
    sum = kernels.pointwise_sum(loss, args, 0, n);
  } else {
    std::vector<double> partial((n + kChunk - 1) / kChunk);
    parallel_for(int64_t(partial.size()), kGrain / kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        partial[i] = kernels.pointwise_sum(loss, args, i * kChunk, std::min(n, (i + 1) * kChunk));
      }
    });
    for (const double part : partial) sum += part;
  }
  return at::empty({}, inputs.input.options()).fill_(reduction == kMean ? sum / double(n) : sum);
}

Tensor backward(Pointwise loss, const Tensor& upstream, const Tensor& input, const Tensor& target,
                const OptionalTensor& weight, int64_t reduction, Params params) {
  const Inputs inputs(loss, input, target, weight, params);
  TORCH_CHECK(upstream.scalar_type() == input.scalar_type(), name_of(loss),
              "_backward: expected an upstream gradient of ", input.scalar_type(), ", got ", upstream.scalar_type());
  TORCH_CHECK(upstream.sizes() == (reduction == kNone ? input.sizes() : at::IntArrayRef()), name_of(loss),
              "_backward: the upstream gradient's size ", upstream.sizes(), " does not fit the loss");
  PointwiseArgs args = inputs.args(params);
  const int64_t n = inputs.input.numel();
  const Upstream read = read_upstream(upstream, inputs.input);
  args.upstream = read.tensor.const_data_ptr();
  args.upstream_stride = read.stride;
  args.scale = reduction == kMean ? 1.0 / double(n) : 1.0;
  Tensor grad = empty_gradient(inputs.input);
  args.output = grad.mutable_data_ptr();
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { cpu_kernels().pointwise_grad(loss, args, begin, end); });
  return grad;
}

using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, Params);

const Ops<ForwardOp, BackwardOp>& ops_of(Pointwise loss) {
  static const std::vector<Ops<ForwardOp, BackwardOp>> ops(std::begin(kPointwiseNames), std::end(kPointwiseNames));
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

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction> {
  static Tensor forward(AutogradContext* ctx, int64_t loss, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, int64_t reduction, Params params) {
    ctx->save_for_backward({input, target, weight.value_or(Tensor())});
    ctx->saved_data["loss"] = loss;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["params"] = params.vec();
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops_of(Pointwise(loss)).forward.call(input, target, weight, reduction, params);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const auto loss = Pointwise(ctx->saved_data["loss"].toInt());
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const std::vector<double> params = ctx->saved_data["params"].toDoubleVector();
    variable_list gradients(6);  // one for each argument of forward
    if (!upstream[0].defined()) return gradients;
    if (at::GradMode::is_enabled()) {
      const variable_list found = differentiable_gradients(loss, upstream[0], input, target, weight, reduction, params);
      gradients[1] = found[0];
      gradients[2] = found[1];
    } else {
      const Tensor grad = ops_of(loss).backward.call(upstream[0], input, target, weight, reduction, params);
      if (ctx->needs_input_grad(0)) gradients[1] = grad;
      if (ctx->needs_input_grad(1)) gradients[2] = grad.neg();
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
                      int64_t reduction, Params params) {
  if (wants_grad(input, target)) {
    TORCH_CHECK(!target.requires_grad() || traits_of(loss, params).of_difference, name_of(loss),
                " is not differentiable with respect to its target");
    return PointwiseFunction::apply(int64_t(loss), input, target, weight, reduction, params);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops_of(loss).forward.call(input, target, weight, reduction, params);
}

namespace {

template <Pointwise kLoss>
Tensor cpu_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                   Params params) {
  return forward(kLoss, input, target, weight, reduction, params);
}

template <Pointwise kLoss>
Tensor cpu_backward(const Tensor& upstream, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    int64_t reduction, Params params) {
  return backward(kLoss, upstream, input, target, weight, reduction, params);
}

template <Pointwise kLoss>
Tensor autograd_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                        Params params) {
  return pointwise_loss(kLoss, input, target, weight, reduction, params);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_DEFINE(name, Functor)                                                                  \
  m.def(#name "(Tensor input, Tensor target, Tensor? weight, int reduction, float[] params) -> Tensor"); \
  m.def(#name                                                                                            \
        "_backward(Tensor upstream, Tensor input, Tensor target, Tensor? weight, int reduction, "        \
        "float[] params) -> Tensor");
#define FUSEDLOSS_CPU(name, Functor)                                  \
  m.impl(#name, &fusedloss::cpu_forward<fusedloss::Pointwise::name>); \
  m.impl(#name "_backward", &fusedloss::cpu_backward<fusedloss::Pointwise::name>);
#define FUSEDLOSS_AUTOGRAD(name, Functor) m.impl(#name, &fusedloss::autograd_forward<fusedloss::Pointwise::name>);

TORCH_LIBRARY_FRAGMENT(fusedloss, m){FUSEDLOSS_POINTWISE(FUSEDLOSS_DEFINE)} TORCH_LIBRARY_IMPL(fusedloss, CPU, m){
    FUSEDLOSS_POINTWISE(FUSEDLOSS_CPU)} TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  FUSEDLOSS_POINTWISE(FUSEDLOSS_AUTOGRAD)
}
