// Forward and backward of the autograd Function of a pointwise loss, whatever its targets are. A Call holds what
// belongs to it beside input and target, and adds
//
//   void save(AutogradContext*) const;                    // its numbers
//   static Call of(AutogradContext*);
//   OptionalTensor& tensors[2];                           // weights, saved with input and target
//   Tensor forward(input, target) const;
//   std::tuple<Tensor, Tensor> with_grad(input, target) const;
//   Tensor backward(upstream, input, target, bool of_target) const;
//   Tensor native(input, target) const;                   // by the native formula
//   bool of_difference() const;                           // d/dt = -d/dx
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace fusedloss {

template <class Call>
struct LossSteps {
  using AutogradContext = torch::autograd::AutogradContext;
  using variable_list = torch::autograd::variable_list;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Call& call,
                        bool grad_in_forward) {
    ctx->save_for_backward({input, target, call.weight.value_or(Tensor()), call.pos_weight.value_or(Tensor())});
    call.save(ctx);
    at::AutoDispatchBelowADInplaceOrView guard;
    if (!grad_in_forward) return call.forward(input, target);
    auto [value, grad] = call.with_grad(input, target);
    ctx->saved_data["grad_in_forward"] = true;
    ctx->saved_data["grad"] = grad;
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const Tensor& upstream = upstreams[0];
    variable_list gradients(4);  // one for each argument of forward
    if (!upstream.defined()) return gradients;
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1];
    Call call = Call::of(ctx);
    if (saved[2].defined()) call.weight = saved[2];
    if (saved[3].defined()) call.pos_weight = saved[3];
    const bool of_input = ctx->needs_input_grad(0), of_target = ctx->needs_input_grad(1);
    if (at::GradMode::is_enabled()) {
      std::tie(gradients[0], gradients[1]) = differentiable(call, upstream, input, target);
      return gradients;
    }
    if (of_input) gradients[0] = gradient(ctx, call, upstream, input, target);
    if (of_target) {
      gradients[1] = of_input && call.of_difference() && target.scalar_type() == input.scalar_type()
                         ? gradients[0].neg()
                         : call.backward(upstream, input, target, true);
    }
    return gradients;
  }

 private:
  static Tensor gradient(AutogradContext* ctx, const Call& call, const Tensor& upstream, const Tensor& input,
                         const Tensor& target) {
    const bool in_forward = ctx->saved_data.count("grad_in_forward") > 0;
    Tensor grad = take_grad(ctx);
    if (!in_forward || !scales_exactly(input, upstream)) {
      grad.reset();
      return call.backward(upstream, input, target, false);
    }
    // A later backward makes it again in the same way: to the bit the same gradient, as gradcheck wants.
    if (!grad.defined()) grad = std::get<1>(call.with_grad(input, target));
    return scale_(grad, upstream);
  }

  // Gradients that carry a graph of their own: native autograd through the native formula.
  static std::pair<Tensor, Tensor> differentiable(const Call& call, const Tensor& upstream, const Tensor& input,
                                                  const Tensor& target) {
    // Views, so that a target computed from the input does not count twice.
    const Tensor x = input.view_as(input), t = target.view_as(target);
    variable_list wanted;
    if (x.requires_grad()) wanted.push_back(x);
    if (t.requires_grad()) wanted.push_back(t);
    const variable_list found = torch::autograd::grad({call.native(x, t)}, wanted, {upstream}, true, true, true);
    return {x.requires_grad() ? found[0] : Tensor(), t.requires_grad() ? found.back() : Tensor()};
  }
};

}  // namespace fusedloss
