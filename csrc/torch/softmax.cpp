// The softmax family in torch: schemas, checks, autograd.

#include "softmax.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace fusedloss {
namespace {

bool valid(Softmax loss, Params given) {
  double params[kMaxParams];
  copy_params(given, params);
  switch (loss) {
#define FUSEDLOSS_VALID(name, Functor) \
  case Softmax::name:                  \
    return baseline::Functor<double>::valid(params);
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_VALID)
#undef FUSEDLOSS_VALID
  }
  TORCH_CHECK(false, "unknown softmax loss ", int64_t(loss));
}

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

}  // namespace

std::optional<SoftmaxLayout> layout_of(const Tensor& logits) {
  const int64_t dim = logits.dim(), classes = logits.size(class_dim(logits));
  SoftmaxLayout layout = {logits.numel() / classes, classes, 1, 0, logits.stride(class_dim(logits)), 0};
  if (dim == 1) return layout;
  const int64_t batch = logits.size(0), batch_stride = logits.stride(0);
  int64_t inner = 1, inner_stride = 0;
  for (int64_t d = dim - 1; d >= 2; --d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    if (size == 1) continue;
    if (inner > 1 && stride != inner * inner_stride) return std::nullopt;
    inner_stride = inner > 1 ? inner_stride : stride;
    inner *= size;
  }
  layout.outer_stride = batch_stride;
  layout.inner = inner;
  layout.inner_stride = inner_stride;
  // The batch goes on where the inner dimension ends: one run of rows.
  if (inner == 1 || batch_stride == inner * inner_stride || batch == 1) {
    layout.inner = layout.rows;
    layout.inner_stride = inner == 1 ? batch_stride : inner_stride;
  }
  return layout;
}

namespace {

void check(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Params params) {
  const char* name = name_of(loss);
  TORCH_CHECK(kernel_dtype(logits.scalar_type()), name, ": expected floating point logits, got ", logits.scalar_type());
  TORCH_CHECK(logits.dim() >= 1 && logits.numel() > 0, name,
              ": expected logits (C), (N, C) or (N, C, d1, ...), not empty, got ", logits.sizes());
  TORCH_CHECK(target.scalar_type() == at::kLong, name, ": expected target dtype to be Long, got ",
              target.scalar_type());
  std::vector<int64_t> expected = logits.sizes().vec();
  expected.erase(expected.begin() + class_dim(logits));
  TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), name, ": expected target size ", at::IntArrayRef(expected),
              ", got ", target.sizes());
  TORCH_CHECK(valid(loss, params), name, ": parameters out of range: ", params);
  TORCH_CHECK(logits.is_cpu() || logits.size(class_dim(logits)) <= kCudaMaxClasses, name, ": expected at most ",
              kCudaMaxClasses, " classes, got ", logits.size(class_dim(logits)));
  check_device(name, "a target", target, logits);
  if (!weight) return;
  check_device(name, "a weight", *weight, logits);
  TORCH_CHECK(weight->scalar_type() == logits.scalar_type(), name, ": expected a weight of the logits' dtype ",
              logits.scalar_type(), ", got ", weight->scalar_type());
  TORCH_CHECK(weight->dim() == 1 && weight->numel() == logits.size(class_dim(logits)), name,
              ": expected a weight for each of ", logits.size(class_dim(logits)), " classes, got size ",
              weight->sizes());
}

}  // namespace

SoftmaxInputs::SoftmaxInputs(Softmax loss, const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_,
                             int64_t ignore_index_, Params params_)
    : logits(logits_), target(target_), ignore_index(ignore_index_), params(params_) {
  check(loss, logits, target, weight_, params);
  if (!layout_of(logits)) logits = logits.contiguous();
  target = target.contiguous();
  if (weight_) weight = weight_->to(arithmetic_type(logits.scalar_type())).contiguous();
}

void SoftmaxInputs::fill(SoftmaxArgs& args) const {
  args.dtype = *kernel_dtype(logits.scalar_type());
  args.logits_layout = layout();
  args.logits = logits.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  args.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  args.ignore_index = ignore_index;
  copy_params(params, args.params);
}

Tensor empty_statistics(const SoftmaxInputs& inputs) {
  const auto options = inputs.logits.options().dtype(arithmetic_type(inputs.logits.scalar_type()));
  return at::empty({2 * inputs.target.numel() + 1}, options);
}

Tensor empty_loss(const SoftmaxInputs& inputs, int64_t reduction) {
  return at::empty(reduction == kNone ? inputs.target.sizes() : at::IntArrayRef(), inputs.logits.options());
}

void check_backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream, const Tensor& statistics,
                    int64_t reduction) {
  const char* name = name_of(loss);
  const at::ScalarType dtype = inputs.logits.scalar_type();
  TORCH_CHECK(upstream.scalar_type() == dtype, name, "_backward: expected an upstream gradient of ", dtype, ", got ",
              upstream.scalar_type());
  check_device(name, "an upstream gradient", upstream, inputs.logits);
  check_device(name, "statistics", statistics, inputs.logits);
  TORCH_CHECK(upstream.sizes() == (reduction == kNone ? inputs.target.sizes() : at::IntArrayRef()), name,
              "_backward: the upstream gradient's size ", upstream.sizes(), " does not fit the loss");
  TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == 2 * inputs.target.numel() + 1 &&
                  statistics.scalar_type() == arithmetic_type(dtype),
              name, "_backward: expected the statistics of the forward, got ", statistics.sizes(), " of ",
              statistics.scalar_type());
}

namespace {

using ForwardOp = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                             Params);
using WithGradOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                      int64_t, Params);
using WithGradInPlaceOp = std::tuple<Tensor, Tensor>(Tensor, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                                     Params);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t,
                          int64_t, Params);
using BackwardInPlaceOp = void(const Tensor&, Tensor, const Tensor&, const OptionalTensor&, const Tensor&, int64_t,
                               int64_t, Params);

struct Ops {
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<WithGradOp> with_grad;
  c10::TypedOperatorHandle<WithGradInPlaceOp> with_grad_;
  c10::TypedOperatorHandle<BackwardOp> backward;
  c10::TypedOperatorHandle<BackwardInPlaceOp> backward_;

  explicit Ops(const std::string& name)
      : forward(find_op(name).typed<ForwardOp>()),
        with_grad(find_op(name + "_with_grad").typed<WithGradOp>()),
        with_grad_(find_op(name + "_with_grad_").typed<WithGradInPlaceOp>()),
        backward(find_op(name + "_backward").typed<BackwardOp>()),
        backward_(find_op(name + "_backward_").typed<BackwardInPlaceOp>()) {}
};

const Ops& ops_of(Softmax loss) {
  static const std::vector<Ops> ops(std::begin(kSoftmaxNames), std::end(kSoftmaxNames));
  return ops[size_t(loss)];
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a later backward needs to know; the tensors are saved beside it.
struct Saved {
  Softmax loss;
  int64_t reduction, ignore_index;
  std::vector<double> params;
  bool in_place;

  static Saved of(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    return {Softmax(data["loss"].toInt()), data["reduction"].toInt(), data["ignore_index"].toInt(),
            data["params"].toDoubleVector(), data.count("in_place") > 0};
  }
};

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  // The statistics go out beside the differentiable outputs: compiled autograd knows no others.
  static Tensor forward(AutogradContext* ctx, int64_t loss, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, Params params,
                        bool grad_in_forward, bool in_place, Tensor* statistics_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Ops& ops = ops_of(Softmax(loss));
    Tensor value, statistics;
    if (grad_in_forward && in_place) {
      std::tie(value, statistics) = ops.with_grad_.call(logits, target, weight, reduction, ignore_index, params);
      logits.unsafeGetTensorImpl()->bump_version();
      // Saved as it is now, so that a change before backward is noticed like any other.
      ctx->save_for_backward({logits, Tensor(), Tensor(), Tensor()});
    } else {
      if (grad_in_forward) {
        Tensor grad;
        std::tie(value, statistics, grad) = ops.with_grad.call(logits, target, weight, reduction, ignore_index, params);
        ctx->saved_data["grad"] = grad;
      } else {
        std::tie(value, statistics) = ops.forward.call(logits, target, weight, reduction, ignore_index, params);
      }
      ctx->save_for_backward({logits, target, weight.value_or(Tensor()), statistics});
    }
    ctx->saved_data["loss"] = loss;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["params"] = params.vec();
    if (in_place) ctx->saved_data["in_place"] = true;
    *statistics_out = statistics;
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list gradients(10);  // one for each argument of forward
    if (!upstream[0].defined()) return gradients;
    const Saved call = Saved::of(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &target = saved[1], &statistics = saved[3];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const Ops& ops = ops_of(call.loss);
    if (call.in_place) {
      TORCH_CHECK(!at::GradMode::is_enabled(), name_of(call.loss),
                  ": inplace=True overwrites the logits, so that backward cannot be differentiated itself "
                  "(create_graph=True)");
      at::AutoDispatchBelowADInplaceOrView guard;
      if (statistics.defined()) {
        ops.backward_.call(upstream[0], logits, target, weight, statistics, call.reduction, call.ignore_index,
                           call.params);
      } else {
        scale_(logits, upstream[0]);
      }
      logits.unsafeGetTensorImpl()->bump_version();  // a second backward is refused, with torch's own words
      gradients[1] = logits.detach();
    } else if (at::GradMode::is_enabled()) {
      // A gradient that carries a graph of its own: native autograd through the native formula.
      const SoftmaxFormula& formula = native_formula(call.loss);
      TORCH_CHECK(formula, name_of(call.loss), ": no native formula to differentiate twice");
      const Tensor x = logits.view_as(logits);
      const Tensor value = formula(x, target, weight, call.reduction, call.ignore_index, call.params);
      gradients[1] = torch::autograd::grad({value}, {x}, {upstream[0]}, true, true)[0];
    } else if (const Tensor grad = take_grad(ctx); grad.defined()) {
      gradients[1] = scale_(grad, upstream[0]);
    } else {
      gradients[1] = ops.backward.call(upstream[0], logits, target, weight, statistics, call.reduction,
                                       call.ignore_index, call.params);
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor> loss_and_statistics(Softmax loss, const Tensor& logits, const Tensor& target,
                                               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                               Params params, bool grad_in_forward, bool in_place) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    TORCH_CHECK(!in_place || !logits.is_leaf(),
                "a leaf Variable that requires grad is being used in an in-place operation.");
    if (in_place) at::assert_no_internal_overlap(logits);
    grad_in_forward = grad_in_forward && may_make_gradient_in_forward(logits, reduction);
    Tensor statistics;
    const Tensor value = SoftmaxFunction::apply(int64_t(loss), logits, target, weight, reduction, ignore_index, params,
                                                grad_in_forward, in_place, &statistics);
    return {value, statistics};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops_of(loss).forward.call(logits, target, weight, reduction, ignore_index, params);
}

}  // namespace

bool owns_softmax(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                  Params params) {
  const int64_t dim = logits.dim();
  if (dim < 1 || target.dim() != dim - 1 || target.scalar_type() != at::kLong || logits.numel() == 0) return false;
  if (!kernel_dtype(logits.scalar_type()) || !valid(loss, params)) return false;
  if (!logits.is_cpu() && logits.size(class_dim(logits)) > kCudaMaxClasses) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.size(d) != logits.size(d == 0 ? 0 : d + 1)) return false;
  }
  return !weight || (weight->scalar_type() == logits.scalar_type() && !weight->requires_grad() && weight->dim() == 1 &&
                     weight->size(0) == logits.size(class_dim(logits)));
}

Tensor softmax_loss(Softmax loss, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    int64_t reduction, int64_t ignore_index, Params params, bool grad_in_forward, bool in_place) {
  return std::get<0>(
      loss_and_statistics(loss, logits, target, weight, reduction, ignore_index, params, grad_in_forward, in_place));
}

namespace {

template <Softmax kLoss>
std::tuple<Tensor, Tensor> autograd_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                            int64_t reduction, int64_t ignore_index, Params params) {
  return loss_and_statistics(kLoss, logits, target, weight, reduction, ignore_index, params, false, false);
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_ARGUMENTS "Tensor target, Tensor? weight, int reduction, int ignore_index, float[] params)"
#define FUSEDLOSS_DEFINE(name, Functor)                                                                              \
  m.def(#name "(Tensor logits, " FUSEDLOSS_ARGUMENTS " -> (Tensor loss, Tensor statistics)");                        \
  m.def(#name "_with_grad(Tensor logits, " FUSEDLOSS_ARGUMENTS " -> (Tensor loss, Tensor statistics, Tensor grad)"); \
  m.def(#name "_with_grad_(Tensor(a!) logits, " FUSEDLOSS_ARGUMENTS " -> (Tensor loss, Tensor statistics)");         \
  m.def(#name                                                                                                        \
        "_backward(Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, "               \
        "int reduction, int ignore_index, float[] params) -> Tensor");                                               \
  m.def(#name                                                                                                        \
        "_backward_(Tensor upstream, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor statistics, "          \
        "int reduction, int ignore_index, float[] params) -> ()");
#define FUSEDLOSS_AUTOGRAD(name, Functor) m.impl(#name, &fusedloss::autograd_forward<fusedloss::Softmax::name>);

TORCH_LIBRARY_FRAGMENT(fusedloss, m){FUSEDLOSS_SOFTMAX(FUSEDLOSS_DEFINE)} TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  FUSEDLOSS_SOFTMAX(FUSEDLOSS_AUTOGRAD)
}
