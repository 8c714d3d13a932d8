#include "second_derivatives.h"

#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace fusedloss {

Factor::Factor(const Tensor& upstream, double divisor, at::ScalarType arithmetic) {
  if (upstream.dim() == 0 && device_for(upstream).host_reads) {
    number = at::_local_scalar_dense(upstream).toDouble() / divisor;
  } else {
    tensor = upstream.to(arithmetic);
    if (divisor != 1) tensor = tensor.div(divisor);
  }
}

Factor::Factor(const Tensor& upstream, const Tensor& divisor, at::ScalarType arithmetic)
    : Factor(upstream, device_for(divisor).host_reads ? number_at(divisor, 0) : 1.0, arithmetic) {
  if (!device_for(divisor).host_reads) tensor = tensor.div(divisor);
}

Tensor Factor::times(const Tensor& data, double by) const {
  if (number) return at::mul(data, *number * by);
  return at::mul(data, by == 1 ? tensor : tensor.mul(by));
}

Tensor Factor::times_(const Tensor& data, double by) const {
  if (number) return data.mul_(*number * by);
  return data.mul_(by == 1 ? tensor : tensor.mul(by));
}

namespace {

double param(const SoftmaxCall& call, size_t i) { return i < call.params.size() ? call.params[i] : 0; }

}  // namespace

bool has_second_derivative(const SoftmaxLoss& loss, const SoftmaxCall& call) {
  if (call.sample_weight || loss.custom) return false;
  switch (loss.kernel()) {
    case Softmax::nll:
      return true;
    case Softmax::cross_entropy:
    case Softmax::soft_cross_entropy:
      return param(call, 2) == 0;  // no softcap
    default:
      return false;
  }
}

namespace {

// The rows that count, each as 1; undefined where all do.
Tensor counted(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& divisor) {
  if (loss.traits.soft) return {};
  const bool known = is_mean(call.reduction) && !call.weight && device_for(divisor).host_reads;
  if (known && number_at(divisor, 0) == double(call.target.numel())) return {};
  return call.target.to(at::kLong).ne(call.ignore_index).to(divisor.scalar_type());
}

// M of each row, whose gradient is M p - k: the sum of k over its classes. Undefined where it is 1 for every row.
Tensor row_masses(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& statistics, const Tensor& counts,
                  at::IntArrayRef rows) {
  if (loss.traits.soft) {
    const int64_t count = c10::multiply_integers(rows);
    return statistics.narrow(0, 2 * count, count).view(rows);
  }
  if (!call.weight) return counts;
  const Tensor weight = call.weight->to(statistics.scalar_type()), kept = counts.ne(0);
  const Tensor classes = at::where(kept, call.target.to(at::kLong), 0);
  Tensor masses = weight.index_select(0, classes.flatten()).view(rows);
  if (const double smoothing = param(call, 0); smoothing != 0) {
    masses = masses.mul_(1 - smoothing).add_(weight.mean(), smoothing);
  }
  return at::where(kept, masses, 0);
}

}  // namespace

// With s = <p, v>: the derivative of M p is M p (v - s), and that of z_loss times the gradient of lse^2, 2 lse p, is
// z_loss times 2 p (lse (v - s) + s).
Tensor second_derivative(const SoftmaxLoss& loss, const SoftmaxCall& call, const Tensor& upstream, const Tensor& logits,
                         const Tensor& statistics, const Tensor& v) {
  if (loss.kernel() == Softmax::nll) return at::zeros_like(v);
  const int64_t dim = class_dim(logits);
  const at::ScalarType arithmetic = statistics.scalar_type();
  std::vector<int64_t> rows = logits.sizes().vec();
  rows.erase(rows.begin() + dim);
  const Tensor divisor = statistics.select(0, -1), counts = counted(loss, call, divisor);
  Tensor coefficients = row_masses(loss, call, statistics, counts, rows);
  const Factor factor(upstream, divisor, arithmetic);

  const Tensor x = logits.to(arithmetic), wide = v.to(arithmetic), p = at::softmax(x, dim);
  const Tensor result = at::_softmax_backward_data(wide, p, dim, arithmetic);
  const double z_loss = param(call, 1);
  Tensor of_sum;
  if (z_loss != 0) {
    Tensor slope = at::logsumexp(x, dim).mul_(2 * z_loss);
    if (counts.defined()) slope = at::where(counts != 0, slope, 0);
    coefficients = coefficients.defined() ? slope.add_(coefficients) : slope.add_(1);
    of_sum = factor.times(counts.defined() ? counts : at::ones(rows, statistics.options()), 2 * z_loss);
  }
  if (!coefficients.defined()) {
    factor.times_(result);
  } else {
    result.mul_(factor.times(coefficients).unsqueeze(dim));
  }
  if (of_sum.defined()) {
    const Tensor sum = at::mul(p, wide).sum(dim, /*keepdim=*/true).mul_(of_sum.unsqueeze(dim));
    result.addcmul_(p, sum);
  }
  return result.to(logits.scalar_type());
}

}  // namespace fusedloss
