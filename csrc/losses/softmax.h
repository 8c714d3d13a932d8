// The softmax losses over class indices: a functor turns what is known of one row into its loss and the coefficient a
// of
//
//     d loss / d x_c = a p_c  (c not the target),    d loss / d x_y = -a (1 - p_y)
//
// To add a loss, write its functor and its line in the list.
#pragma once

#include "math.h"

namespace fusedloss::FUSEDLOSS_ISA {

// Statistics of a row, the target column y left out: rest = sum over j != y of exp(x_j - max), max over j != y.
// Leaving y out is what keeps the digits of a confident row: 1 - p_y is never formed by subtraction.
template <class T>
struct RowStatistics {
  T max, rest;
};

// The row as a functor sees it: ce = -log p, p the probability of the target, q = 1 - p, and what the other columns
// need: p_c = exp(x_c - max) * inverse.
template <class T>
struct Row {
  T ce, p, q, max, inverse;
};

template <class T>
FUSEDLOSS_HD Row<T> complete(RowStatistics<T> statistics, T logit) {
  const bool target_is_max = logit >= statistics.max;
  const T max = select(target_is_max, logit, statistics.max);
  // A lone +infinity makes inf - inf = NaN here, as in torch.
  const T rest = statistics.rest * exp(statistics.max - max), own = exp(logit - max);
  const T inverse = T(1) / (rest + own);
  // total - 1, formed without ever adding and taking away the 1.
  const T excess = select(target_is_max, rest, (rest - T(1)) + own);
  return {(max - logit) + log1p(excess), own * inverse, rest * inverse, max, inverse};
}

template <class T>
struct LossAndCoefficient {
  T loss, a;
};

// torch.nn.functional.cross_entropy with class indices.
template <class T>
struct CrossEntropy {
  static constexpr bool mean_by_weight = true;  // the mean divides by the sum of the weights
  static bool valid(const double*) { return true; }
  explicit FUSEDLOSS_HD CrossEntropy(const double*) {}
  FUSEDLOSS_HD LossAndCoefficient<T> operator()(const Row<T>& row) const { return {row.ce, T(1)}; }
};

// q^gamma ce, times a factor alpha. With rho = ce p / q -> 1 as q -> 0 the gradient is q^gamma (1 + gamma rho), which
// has no singularity left for any gamma >= 0.
template <class T>
struct Focal {
  static constexpr bool mean_by_weight = false;  // the mean divides by the number of targets not ignored
  T alpha, gamma;

  static bool valid(const double* params) { return params[1] >= 0; }
  explicit FUSEDLOSS_HD Focal(const double* params) : alpha(T(params[0])), gamma(T(params[1])) {}

  FUSEDLOSS_HD LossAndCoefficient<T> operator()(const Row<T>& row) const {
    const T modulation = alpha * power(row.q, gamma);
    const T ratio = select(row.q == T(0), T(1), select(row.p == T(0), T(0), row.ce * (row.p / row.q)));
    return {modulation * row.ce, modulation * (T(1) + gamma * ratio)};
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_SOFTMAX(X)     \
  X(cross_entropy, CrossEntropy) \
  X(focal, Focal)
