// The softmax losses: what a loss makes of a row of logits.
//
// A row is known by its statistics, collected in one pass. A loss turns them into its value and into the coefficients
// of its gradient, which for every one of them is
//
//     d value / d z_c = p_c (a + b + h (z_c - max)) - b [c == y] - s k_c
//
// where z = logit(x) is what the softmax p is taken of, y is the target, and k_c = factor(weight, probability) belongs
// to the column. To add a loss, write its functor and its line in the list.
#pragma once

#include "logit.h"
#include "range.h"

namespace fusedloss::FUSEDLOSS_ISA {

// What a row sums beside its exponentials: nothing, k_c (max - z_c), or e^(z_c - max) (z_c - max).
enum class Sum { none, linear, entropy };

// What is known of a row. The target's column y is left out: max is over j != y, sum_without_target is the sum over
// j != y of exp(z_j - max). That keeps the digits of a confident row: 1 - p_y is never formed by subtraction.
template <class T>
struct RowStatistics {
  T max, sum_without_target, sum, mass;  // sum as above; mass: the sum of k_c
};

// A term of Sum::linear; a class of factor 0 adds nothing, even where it is masked by -infinity.
template <class T>
FUSEDLOSS_HD T linear_term(T factor, T below_max) {
  return select(factor == T(0), T(0), factor * below_max);
}

// A term of Sum::entropy: 0 where the exponential is.
template <class T>
FUSEDLOSS_HD T entropy_term(T exponential, T gap) {
  return exponential * (gap < Constants<T>::exp_lowest ? Constants<T>::exp_lowest : gap);
}

// The same statistics seen from a higher max.
template <Sum kSum, class T>
FUSEDLOSS_HD RowStatistics<T> raised(RowStatistics<T> row, T max) {
  const T gap = row.max - max, shrunk = exp(gap);
  if constexpr (kSum == Sum::linear) row.sum -= linear_term(row.mass, gap);
  if constexpr (kSum == Sum::entropy) {
    row.sum = select(row.sum_without_target == T(0), T(0), (row.sum + row.sum_without_target * gap) * shrunk);
  }
  return {max, row.sum_without_target * shrunk, row.sum, row.mass};
}

// The row as a functor sees it: ce = -log p, p the probability of the target, q = 1 - p, p_c = exp(z_c - max) *
// inverse, log_total = lse - max, and sum and mass over all columns. Without a target (logit -infinity) p = 0 and q
// = 1.
template <class T>
struct Row {
  T ce, p, q, max, inverse, log_total, sum, mass;
  FUSEDLOSS_HD T lse() const { return max + log_total; }
};

template <Sum kSum, class T>
FUSEDLOSS_HD Row<T> complete(RowStatistics<T> statistics, T logit, T factor_of_target) {
  const bool target_is_max = logit >= statistics.max;
  const T max = select(target_is_max, logit, statistics.max);
  statistics = raised<kSum>(statistics, max);
  // A lone +infinity makes inf - inf = NaN here, as in torch.
  const T sum_without_target = statistics.sum_without_target, own = exp(logit - max);
  const T inverse = T(1) / (sum_without_target + own);
  // total - 1, formed without ever adding and taking away the 1.
  const T log_total = log1p(select(target_is_max, sum_without_target, (sum_without_target - T(1)) + own));
  T sum = statistics.sum;
  if constexpr (kSum == Sum::linear) sum += linear_term(factor_of_target, max - logit);
  if constexpr (kSum == Sum::entropy) sum += entropy_term(own, logit - max);
  return {(max - logit) + log_total,         own * inverse, sum_without_target * inverse, max, inverse, log_total, sum,
          statistics.mass + factor_of_target};
}

template <class T>
struct Coefficients {
  T a, b, s, h;

  // The gradient of the target's column: p_y - 1 is -q, so that nothing cancels.
  FUSEDLOSS_HD T own(const Row<T>& row, T logit, T factor) const {
    return a * row.p - b * row.q - s * factor + h * entropy_term(row.p, logit - row.max);
  }
};

// What most losses have in common; they say otherwise where they differ.
template <class T>
struct SoftmaxLoss {
  static constexpr Sum sum = Sum::none;
  static constexpr bool soft = false;              // targets are probabilities of every class
  static constexpr bool mean_by_weight = false;    // the mean divides by the sum of weights, not the number of rows
  static constexpr bool reads_row = true;          // false: the loss reads only the target's logit
  static constexpr bool second_of_ignored = true;  // false: the second result of ignored rows is 0
  FUSEDLOSS_HD T factor(T, T) const { return T(0); }
  // The second result, on request; `upstream_second` is its upstream gradient.
  FUSEDLOSS_HD T second(const Row<T>& row) const { return row.lse(); }
};

// torch.nn.functional.cross_entropy with class indices, smoothing e over C classes and z-loss lambda:
// w_y (1 - e) ce + e / C * sum_c w_c (lse - z_c) + lambda lse^2.
template <class T, class Logit, bool kSmooth>
struct CrossEntropyWith : SoftmaxLoss<T> {
  static constexpr Sum sum = kSmooth ? Sum::linear : Sum::none;
  static constexpr bool mean_by_weight = true;
  Logit logit;
  T kept, uniform, z_loss;

  FUSEDLOSS_HD CrossEntropyWith(const double* params, int64_t classes)
      : logit(params[2]), kept(T(1 - params[0])), uniform(T(params[0] / double(classes))), z_loss(T(params[1])) {}

  FUSEDLOSS_HD T factor(T weight, T) const { return weight; }
  FUSEDLOSS_HD T value(const Row<T>& row, T weight) const {
    // row.sum is infinite behind a mask
    const T smooth = kSmooth ? linear_term(uniform, row.mass * row.log_total + row.sum) : T(0);
    return kept * weight * row.ce + smooth + z_loss * row.lse() * row.lse();
  }
  FUSEDLOSS_HD Coefficients<T> gradient(const Row<T>& row, T weight, T upstream, T upstream_second) const {
    const T b = upstream * kept * weight, s = upstream * uniform;
    const T smooth = kSmooth ? s * row.mass : T(0);
    return {smooth + T(2) * upstream * z_loss * row.lse() + upstream_second, b, s, T(0)};
  }
};

template <class T>
struct CrossEntropy : CrossEntropyWith<T, Softcap<T>, true> {
  struct Smooth : CrossEntropyWith<T, Unchanged<T>, true> {
    using Specialised = CrossEntropyWith<T, Unchanged<T>, false>;
    static bool applies(const double* params) { return params[0] == 0; }
    FUSEDLOSS_HD Smooth(const double* params, int64_t classes)
        : CrossEntropyWith<T, Unchanged<T>, true>(params, classes) {}
  };
  using Specialised = Smooth;  // without a softcap
  static bool applies(const double* params) { return params[2] == 0; }

  static constexpr Range params[] = {{0, 1}, {0}, {0}};  // smoothing, z-loss, softcap
  FUSEDLOSS_HD CrossEntropy(const double* params, int64_t classes)
      : CrossEntropyWith<T, Softcap<T>, true>(params, classes) {}
};

// The same with class probabilities t, which smoothing turns into t (1 - e) + e / C: sum_c k_c (lse - z_c) with
// k_c = w_c t_c.
template <class T, class Logit>
struct SoftCrossEntropyWith : SoftmaxLoss<T> {
  static constexpr Sum sum = Sum::linear;
  static constexpr bool soft = true;
  Logit logit;
  T kept, uniform, z_loss;

  FUSEDLOSS_HD SoftCrossEntropyWith(const double* params, int64_t classes)
      : logit(params[2]), kept(T(1 - params[0])), uniform(T(params[0] / double(classes))), z_loss(T(params[1])) {}

  FUSEDLOSS_HD T factor(T weight, T probability) const { return weight * (probability * kept + uniform); }
  FUSEDLOSS_HD T value(const Row<T>& row, T) const {
    return row.mass * row.log_total + row.sum + z_loss * row.lse() * row.lse();
  }
  FUSEDLOSS_HD Coefficients<T> gradient(const Row<T>& row, T, T upstream, T upstream_second) const {
    return {upstream * (row.mass + T(2) * z_loss * row.lse()) + upstream_second, T(0), upstream, T(0)};
  }
};

template <class T>
struct SoftCrossEntropy : SoftCrossEntropyWith<T, Softcap<T>> {
  using Specialised = SoftCrossEntropyWith<T, Unchanged<T>>;
  static bool applies(const double* params) { return params[2] == 0; }
  static constexpr Range params[] = {{0, 1}, {0}, {0}};  // smoothing, z-loss, softcap
  FUSEDLOSS_HD SoftCrossEntropy(const double* params, int64_t classes)
      : SoftCrossEntropyWith<T, Softcap<T>>(params, classes) {}
};

// torch.nn.functional.nll_loss: the logits are log-probabilities already.
template <class T>
struct Nll : SoftmaxLoss<T> {
  static constexpr bool mean_by_weight = true, reads_row = false;
  Unchanged<T> logit;

  FUSEDLOSS_HD Nll(const double*, int64_t) {}
  FUSEDLOSS_HD T value(T logit, T weight) const { return -weight * logit; }
  FUSEDLOSS_HD T gradient(T weight, T upstream) const { return -weight * upstream; }
};

// q^gamma ce, times a factor alpha. With rho = ce p / q -> 1 as q -> 0 the gradient is q^gamma (1 + gamma rho), which
// has no singularity left for any gamma >= 0.
template <class T>
struct Focal : SoftmaxLoss<T> {
  Unchanged<T> logit;
  T alpha, gamma;

  static constexpr Range params[] = {{-kInfinity}, {0}};  // alpha, gamma
  FUSEDLOSS_HD Focal(const double* params, int64_t) : alpha(T(params[0])), gamma(T(params[1])) {}

  FUSEDLOSS_HD T modulation(const Row<T>& row, T weight) const { return weight * alpha * power(row.q, gamma); }
  FUSEDLOSS_HD T value(const Row<T>& row, T weight) const { return modulation(row, weight) * row.ce; }
  FUSEDLOSS_HD Coefficients<T> gradient(const Row<T>& row, T weight, T upstream, T upstream_second) const {
    const T ratio = select(row.q == T(0), T(1), select(row.p == T(0), T(0), row.ce * (row.p / row.q)));
    const T b = upstream * modulation(row, weight) * (T(1) + gamma * ratio);
    return {upstream_second, b, T(0), T(0)};
  }
};

// log p of the target at a temperature, and as second result the entropy -sum_c p_c log p_c of the row.
template <class T, Sum kSum>
struct LogProbsWith : SoftmaxLoss<T> {
  static constexpr Sum sum = kSum;
  static constexpr bool second_of_ignored = false;
  Scaled<T> logit;

  FUSEDLOSS_HD LogProbsWith(const double* params, int64_t) : logit(params[0]) {}
  FUSEDLOSS_HD T value(const Row<T>& row, T) const { return -row.ce; }
  FUSEDLOSS_HD T second(const Row<T>& row) const { return row.log_total - row.sum * row.inverse; }
  FUSEDLOSS_HD Coefficients<T> gradient(const Row<T>& row, T, T upstream, T upstream_second) const {
    return {upstream_second * row.sum * row.inverse, -upstream, T(0), -upstream_second};
  }
};

template <class T>
struct LogProbs : LogProbsWith<T, Sum::entropy> {
  using Specialised = LogProbsWith<T, Sum::none>;
  static bool applies(const double* params) { return params[1] == 0; }     // no entropy asked for
  static constexpr Range params[] = {{0, kInfinity, true}, {-kInfinity}};  // temperature, entropy
  FUSEDLOSS_HD LogProbs(const double* params, int64_t classes) : LogProbsWith<T, Sum::entropy>(params, classes) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_SOFTMAX(X)              \
  X(cross_entropy, CrossEntropy)          \
  X(soft_cross_entropy, SoftCrossEntropy) \
  X(nll, Nll)                             \
  X(focal, Focal)                         \
  X(log_probs, LogProbs)
