// The softmax family under autograd.

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "softmax.h"

namespace fusedloss {
namespace {

using ForwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                     int64_t, Params, bool, bool);
using WithGradOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                                                      int64_t, Params, bool);
using WithGradInPlaceOp = std::tuple<Tensor, Tensor>(Tensor, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                                                     Params, bool);
using BackwardOp = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                          const Tensor&, int64_t, int64_t, Params);
using BackwardInPlaceOp = void(const Tensor&, const OptionalTensor&, Tensor, const Tensor&, const OptionalTensor&,
                               const Tensor&, int64_t, int64_t, Params);

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
  bool wide, second, in_place, grad_in_forward;

  void save(AutogradContext* ctx) const {
    auto& data = ctx->saved_data;
    data["loss"] = int64_t(loss);
    data["reduction"] = reduction;
    data["ignore_index"] = ignore_index;
    data["params"] = params;
    data["flags"] = int64_t(wide) | int64_t(second) << 1 | int64_t(in_place) << 2 | int64_t(grad_in_forward) << 3;
  }
  static Saved of(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    const int64_t flags = data["flags"].toInt();
    return {Softmax(data["loss"].toInt()),
            data["reduction"].toInt(),
            data["ignore_index"].toInt(),
            data["params"].toDoubleVector(),
            bool(flags & 1),
            bool(flags & 2),
            bool(flags & 4),
            bool(flags & 8)};
  }
};

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  // The statistics go out beside the differentiable outputs: compiled autograd knows no others.
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, Softmax loss, const SoftmaxCall& call,
                               bool grad_in_forward, bool in_place, Tensor* statistics_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    const Ops& ops = ops_of(loss);
    Tensor value, second, statistics;
    if (grad_in_forward && in_place) {
      std::tie(value, statistics) = ops.with_grad_.call(logits, call.target, call.weight, call.reduction,
                                                        call.ignore_index, call.params, call.wide);
      logits.unsafeGetTensorImpl()->bump_version();
      // Saved as it is now, so that a change before backward is noticed like any other.
      ctx->save_for_backward({logits, Tensor(), Tensor(), Tensor()});
    } else {
      if (grad_in_forward) {
        Tensor grad;
        std::tie(value, statistics, grad) = ops.with_grad.call(logits, call.target, call.weight, call.reduction,
                                                               call.ignore_index, call.params, call.wide);
        ctx->saved_data["grad"] = grad;
      } else {
        std::tie(value, second, statistics) = ops.forward.call(logits, call.target, call.weight, call.reduction,
                                                               call.ignore_index, call.params, call.wide, call.second);
      }
      ctx->save_for_backward({logits, call.target, call.weight.value_or(Tensor()), statistics});
    }
    Saved{loss, call.reduction, call.ignore_index, call.params.vec(), call.wide, call.second, in_place, grad_in_forward}
        .save(ctx);
    *statistics_out = statistics;
    return call.second ? variable_list{value, second} : variable_list{value};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    variable_list gradients(6);  // one for each argument of forward
    const Saved saved = Saved::of(ctx);
    const auto tensors = ctx->get_saved_variables();
    const Tensor &logits = tensors[0], &target = tensors[1], &statistics = tensors[3];
    const OptionalTensor weight = tensors[2].defined() ? OptionalTensor(tensors[2]) : std::nullopt;
    const SoftmaxCall call = {target,       weight,     saved.reduction, saved.ignore_index,
                              saved.params, saved.wide, saved.second};
    Tensor upstream = upstreams[0];
    const OptionalTensor second = saved.second && upstreams[1].defined() ? OptionalTensor(upstreams[1]) : std::nullopt;
    if (!upstream.defined()) {
      if (!second) return gradients;
      upstream = at::zeros(saved.reduction == kNone ? second->sizes() : at::IntArrayRef(), second->options());
    }
    if (saved.in_place) {
      TORCH_CHECK(!at::GradMode::is_enabled(), name_of(saved.loss),
                  ": inplace=True overwrites the logits, so that backward cannot be differentiated itself "
                  "(create_graph=True)");
      gradients[0] = in_place(saved.loss, logits, call, statistics, upstream, second);
    } else if (at::GradMode::is_enabled()) {
      gradients[0] = differentiable(saved.loss, logits, call, upstream, second);
    } else if (Tensor grad = take_grad(ctx); saved.grad_in_forward && scales_exactly(logits, upstream)) {
      // A later backward makes it again in the same way: to the bit the same gradient, as gradcheck wants.
      if (!grad.defined()) {
        grad = std::get<2>(
            ops_of(saved.loss)
                .with_grad.call(logits, target, weight, call.reduction, call.ignore_index, call.params, call.wide));
      }
      gradients[0] = scale_(grad, upstream);
    } else {
      grad.reset();
      gradients[0] = ops_of(saved.loss)
                         .backward.call(upstream, second, logits, target, weight, statistics, call.reduction,
                                        call.ignore_index, call.params);
    }
    return gradients;
  }

  static Tensor in_place(Softmax loss, const Tensor& logits, const SoftmaxCall& call, const Tensor& statistics,
                         const Tensor& upstream, const OptionalTensor& second) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (statistics.defined()) {
      ops_of(loss).backward_.call(upstream, second, logits, call.target, call.weight, statistics, call.reduction,
                                  call.ignore_index, call.params);
    } else {
      scale_(logits, upstream);
    }
    logits.unsafeGetTensorImpl()->bump_version();  // a second backward is refused, with torch's own words
    return logits.detach();
  }

  // A gradient that carries a graph of its own: native autograd through the native formula.
  static Tensor differentiable(Softmax loss, const Tensor& logits, const SoftmaxCall& call, const Tensor& upstream,
                               const OptionalTensor& second) {
    const SoftmaxFormula& formula = native_formula(loss);
    TORCH_CHECK(formula, name_of(loss), ": no native formula to differentiate twice");
    const Tensor x = logits.view_as(logits);
    variable_list values = formula(x, call), upstreams = {upstream};
    if (second) {
      upstreams.push_back(*second);
    } else {
      values.resize(1);
    }
    return torch::autograd::grad(values, {x}, upstreams, true, true)[0];
  }
};

std::tuple<Tensor, Tensor, Tensor> with_statistics(Softmax loss, const Tensor& logits, const SoftmaxCall& call,
                                                   bool grad_in_forward, bool in_place) {
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops_of(loss).forward.call(logits, call.target, call.weight, call.reduction, call.ignore_index, call.params,
                                     call.wide, call.second);
  }
  TORCH_CHECK(!in_place || !logits.is_leaf(),
              "a leaf Variable that requires grad is being used in an in-place operation.");
  if (in_place) at::assert_no_internal_overlap(logits);
  grad_in_forward = grad_in_forward && !call.second && traits_of(loss).reads_row &&
                    may_make_gradient_in_forward(logits, call.reduction);
  Tensor statistics;
  variable_list values = SoftmaxFunction::apply(logits, loss, call, grad_in_forward, in_place, &statistics);
  return {values[0], call.second ? values[1] : Tensor(), statistics};
}

// What the dispatcher calls.
template <Softmax kLoss>
std::tuple<Tensor, Tensor, Tensor> autograd_forward(const Tensor& logits, const Tensor& target,
                                                    const OptionalTensor& weight, int64_t reduction,
                                                    int64_t ignore_index, Params params, bool wide, bool second) {
  auto results =
      with_statistics(kLoss, logits, {target, weight, reduction, ignore_index, params, wide, second}, false, false);
  Tensor& of_second = std::get<1>(results);
  if (!of_second.defined()) of_second = at::empty({0}, std::get<0>(results).options());
  return results;
}

}  // namespace

std::tuple<Tensor, Tensor> softmax_loss(Softmax loss, const Tensor& logits, const SoftmaxCall& call,
                                        std::optional<bool> grad_in_forward, bool in_place) {
  const bool in_forward = grad_in_forward.value_or(
      // There it saves a read and an exponential, and multiplying takes no longer than a backward of its own.
      !in_place && logits.is_cpu() && gradient_in_forward_pays(logits, call.reduction));
  const auto results = with_statistics(loss, logits, call, in_forward, in_place);
  return {std::get<0>(results), std::get<1>(results)};
}

}  // namespace fusedloss

#define FUSEDLOSS_AUTOGRAD(name, Functor) m.impl(#name, &fusedloss::autograd_forward<fusedloss::Softmax::name>);

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) { FUSEDLOSS_SOFTMAX(FUSEDLOSS_AUTOGRAD) }
