#include <ATen/ops/mul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros_like.h>

#include "second_derivatives.h"

namespace fusedloss {
namespace {

// v times d^2 value / d x^2 up to a number `by`, as torch's own double backward has it where the slope jumps. `product`
// may be v itself.
struct Curvature {
  Tensor product;
  double by = 1;
};

Tensor widened(const Tensor& tensor) { return is_half(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor; }

// Quadratic where |x - t| is below a bound.
Curvature within(double bound, const Tensor& x, const Tensor& t, const Tensor& v) {
  return {at::sub(widened(x), widened(t)).abs_().lt_(bound).mul_(v)};
}

Curvature of_probabilities(const Tensor& input, const Tensor& target, const Tensor& v) {
  constexpr double kLeast = 1e-12;
  const Tensor x = widened(input), t = widened(target);
  const Tensor product = at::sub(x, t, 2).mul_(x).add_(t);  // x^2 - 2 x t + t
  return {product.div_(at::rsub(x, 1).add_(kLeast).mul_(x.add(kLeast)).square_()).mul_(v)};
}

Curvature of_logits(const Tensor& x, const Tensor& t, const Tensor& v, const OptionalTensor& third) {
  const Tensor p = at::sigmoid(widened(x)), product = at::sigmoid_backward(v.to(p.scalar_type()), p);
  if (!third) return {product};
  return {product.mul(at::mul(widened(t), widened(*third).sub(1)).add_(1))};
}

Curvature curvature(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& x, const Tensor& t,
                    const Tensor& v) {
  const double bound = call.params.empty() ? 0 : call.params[0];
  switch (Pointwise(loss.number)) {
    case Pointwise::mse:
      return {v, 2};
    case Pointwise::smooth_l1:
      if (bound == 0) return {at::zeros_like(v)};
      return {within(bound, x, t, v).product, 1 / bound};
    case Pointwise::huber:
      return within(bound, x, t, v);
    case Pointwise::binary_cross_entropy:
      return of_probabilities(x, t, v);
    case Pointwise::binary_cross_entropy_with_logits:
      return of_logits(x, t, v, call.third);
    default:  // l1
      return {at::zeros_like(v)};
  }
}

}  // namespace

bool has_second_derivative(const PointwiseLoss& loss, const PointwiseCall& call) {
  switch (Pointwise(loss.number)) {
    case Pointwise::mse:
    case Pointwise::l1:
    case Pointwise::smooth_l1:
    case Pointwise::huber:
    case Pointwise::binary_cross_entropy:
    case Pointwise::binary_cross_entropy_with_logits:
      return !call.ignore_index;
    default:
      return false;
  }
}

Tensor second_derivative(const PointwiseLoss& loss, const PointwiseCall& call, const Tensor& upstream,
                         const Tensor& input, const Tensor& target, const Tensor& v) {
  const Factor factor(upstream, call.reduction == kMean ? double(input.numel()) : 1.0,
                      arithmetic_type(upstream.scalar_type()));
  auto [product, by] = curvature(loss, call, input, target, v);
  if (call.weight) product = at::mul(product, *call.weight);
  product = product.is_same(v) ? factor.times(product, by) : factor.times_(product, by);
  return product.to(input.scalar_type());
}

}  // namespace fusedloss
