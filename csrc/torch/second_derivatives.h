// The second derivatives that are known in closed form, for a backward that is itself differentiated: gradient
// penalties and Hessian-vector products. The gradient is then a function of its own, of the upstream gradient and of
// what the loss was given; it is made as without create_graph, and differentiated when somebody asks. A loss without a
// closed form, and every third derivative, differentiates the native formula.
#pragma once

#include "pointwise.h"
#include "softmax.h"

namespace fusedloss {

bool has_second_derivative(const PointwiseLoss& loss, const PointwiseCall& call);
bool has_second_derivative(const SoftmaxLoss& loss, const SoftmaxCall& call);

// The derivative by the input of <v, gradient by the input>, in the dtype of the input.
Tensor second_derivative(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& upstream,
                         const Tensor& input, const Tensor& target, const Tensor& v);
// `statistics` are what forward left.
Tensor second_derivative(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& upstream, const Tensor& logits,
                         const Tensor& statistics, const Tensor& v);

// The upstream gradient over a divisor: a number where the host may read it, so that half precision does not round it.
class Factor {
 public:
  Factor(const Tensor& upstream, double divisor, at::ScalarType arithmetic);
  Factor(const Tensor& upstream, const Tensor& divisor, at::ScalarType arithmetic);
  Tensor times(const Tensor& data, double by = 1) const;
  Tensor times_(const Tensor& data, double by = 1) const;  // in place; returns data

 private:
  std::optional<double> number;
  Tensor tensor;
};

}  // namespace fusedloss
