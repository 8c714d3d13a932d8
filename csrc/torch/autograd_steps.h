// What the backwards of both families have in common: where a gradient is made, and how a backward is itself
// differentiated.
#pragma once

#include <torch/csrc/autograd/autograd.h>

#include "loss_node.h"

namespace fusedloss {

// The ops of a loss, looked up at its first call.
template <class Loss>
const auto& handles_of(const Loss& loss) {
  auto* handles = loss.handles.load(std::memory_order_acquire);
  if (!handles) {  // two threads may find the same ones
    handles = new std::remove_pointer_t<decltype(handles)>(loss.op);
    loss.handles.store(handles, std::memory_order_release);
  }
  return *handles;
}

// Whether an op or a backward must leave its work to the native formula, because a C++ Function cannot answer it:
// inside a transform of torch.func, for a batch of upstream gradients (is_grads_batched, jacobian(vectorize=True)), and
// for dual tensors of forward-mode AD, whose tangents it would lose. The eager route declines such calls by itself; the
// op meets them in a captured graph.
bool needs_formula(std::initializer_list<OptionalTensor> tensors);

// The ops that autograd calls are not differentiable themselves, and say so instead of losing a gradient or tangent.
void refuse_derivatives(torch::Library& m, const std::string& op);

// Whether forward may make the gradient of a call before its upstream gradient is known. Only a reduction to one value
// has one upstream gradient to multiply by. In fp16 the gradient of a mean would underflow before a loss scale could
// lift it.
bool may_make_gradient_in_forward(const Tensor& input, int64_t reduction);
void check_gradient_in_forward(const char* name, const Tensor& input, int64_t reduction);

// Checkpointing, offloading.
bool under_saved_tensor_hooks();

// Whether make_fx records the ops that run. Its graph may be differentiated, so that it has no use for a gradient made
// in forward, or for overwritten logits. A compiler, which makes the tensors functional first, differentiates no more.
bool recorded();

// Whether to make it unasked. Under saved-tensor hooks everything that forward leaves must pass through the hooks, and
// a gradient does not.
bool gradient_in_forward_pays(const Tensor& input, int64_t reduction);

// Where the gradient of a loss is made. Forward leaves it with what autograd keeps for backward, or, in a captured
// graph, whose ops are on their own, tied to one of its results (carried.h).
enum class GradientIn { Backward, Forward, Carried };

// What forward left. Taken at every backward, of which the first alone finds the tensor: it scales it and gives it
// away, without a look at the tensors that forward saved, which may have been overwritten since. A later backward makes
// it again in the same way, so that it gets the same bits: gradcheck compares them. A graph of the backward, which may
// run many times, takes nothing.
GradientOfForward take_gradient(Kept& kept, const Tensor& upstream);

// What was left times the upstream gradient, in the same memory unless something else holds it: compiled autograd hands
// every backward a copy of what was kept.
Tensor scaled(const Tensor& left, const Tensor& upstream);

// What forward made, times the upstream gradient. Where it was given away, `make` makes it again in the same way.
template <class Make>
Tensor scaled(const GradientOfForward& of_forward, const Tensor& upstream, Make make) {
  return of_forward.left.defined() ? scaled(of_forward.left, upstream) : scale_(make(), upstream);
}

// Whether a graph of the backward is being made of it.
bool is_traced(const Tensor& upstream);

// Whether a gradient of forward times the upstream one is to the last digit what backward makes. `like` has the dtype
// and device of the input: a bfloat16 gradient would be rounded twice.
bool scales_exactly(const Tensor& like, const Tensor& upstream);

// Gradients by native autograd through the native formula; under create_graph they carry a graph of their own. Entries
// are undefined for inputs that require none. `formula` is called with views of the inputs, so that a target that was
// computed from the input does not count twice.
variable_list differentiable_gradients(const std::string& op, const variable_list& inputs,
                                       const variable_list& upstreams,
                                       const std::function<variable_list(const variable_list&)>& formula);

}  // namespace fusedloss
