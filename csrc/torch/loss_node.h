// A loss in torch's autograd graph: what its forward keeps, and the node that runs its backward. torch::autograd::
// Function does the same for any C++ function, with maps, sets and vectors of what may be there: 12,000 instructions
// more in a step, where the forward of torch's whole nll_loss takes 20,000.
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>

#include <array>
#include <string>

#include "common.h"

namespace fusedloss {

using torch::autograd::variable_list;

constexpr size_t kMostSaved = 5;  // with six a node is too large for malloc's cache
using SavedTensors = std::array<Tensor, kMostSaved>;

// The numbers of a call.
struct SavedCall {
  int64_t loss, reduction, ignore_index, flags;
  c10::SmallVector<double, kMaxParams> params;
};

// The gradient that forward made for an upstream gradient of 1, left for the first backward.
struct GradientOfForward {
  bool made = false;
  Tensor left = {};  // undefined where it was not made, or was given away
};

// What a backward is given beside the upstream gradients.
struct Kept {
  SavedCall call;
  GradientOfForward of_forward;

  virtual SavedTensors tensors() const = 0;    // raises where they were freed, or overwritten since
  virtual bool wants(size_t input) const = 0;  // the gradient by this input

 protected:
  Kept() = default;
  Kept(SavedCall&& call, GradientOfForward&& of_forward) : call(std::move(call)), of_forward(std::move(of_forward)) {}
  ~Kept() = default;
};

struct Backward {
  const char* name;  // that profilers show
  bool traceable;    // by compiled autograd: it reads no number of a tensor that the tracer hands it
  // Returns a gradient for each input, undefined where there is none. An upstream gradient may be undefined too.
  variable_list (*run)(Kept&, const variable_list& upstreams);
  std::string (*op)(int64_t loss) = nullptr;  // of a loss, whose name its node then has
};

inline const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// While it lives, ops run below autograd: what makes the results that `differentiate` then puts into the graph.
struct BelowAutograd {
  at::AutoGradMode grad_mode{false};
  at::AutoDispatchBelowADInplaceOrView dispatch;
};

// Puts the results of a call into the autograd graph, as functions of the inputs, if one of them requires a gradient.
// A null pointer stands for an undefined tensor. What is saved goes through torch's hooks for saved tensors.
void differentiate(const Backward& backward, SavedCall call, GradientOfForward of_forward,
                   c10::ArrayRef<const Tensor*> inputs, c10::ArrayRef<const Tensor*> saved,
                   c10::ArrayRef<const Tensor*> results);

}  // namespace fusedloss
