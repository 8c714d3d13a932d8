// The gradient that forward made, on its way to the backward of a captured graph. The ops of a graph hand each other
// tensors alone, and a compiler may give the memory of each to another once it is read for the last time. So the
// gradient is tied to the memory of a small result that forward leaves to backward, and leaves no trace in the graph:
// backward finds it there, or makes it from its other arguments.
#pragma once

#include "autograd_steps.h"

namespace fusedloss {

// `by` has memory of its own.
void carry(const Tensor& by, const Tensor& grad);

// Of which the first call alone finds the tensor.
GradientOfForward take_carried(const Tensor& by);

}  // namespace fusedloss
