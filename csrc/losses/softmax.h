// The softmax losses: what a loss makes of a row of logits. row.h has what they share: what is known of a row, and the
// formula whose coefficients `gradient` returns. To add a loss, write its functor and its line in the list.
#pragma once

#include "range.h"
#include "row.h"

namespace fusedloss::FUSEDLOSS_ISA {

// What most losses have in common; they say otherwise where they differ.
template <class T>
struct OfRow {
  using Sum = SumNone;                             // what the row sums beside its exponentials
  static constexpr bool soft = false;              // targets are probabilities of every class
  static constexpr bool mean_by_weight = false;    // the mean divides by the sum of weights, not the number of rows
  static constexpr bool reads_row = true;          // false: the loss reads only the target's logit
  static constexpr bool second_of_ignored = true;  // false: the second result of ignored rows is 0
  static constexpr bool takes_power = false;       // of a row, which needs registers
  FUSEDLOSS_HD T factor(T, T) const { return T(0); }
  // The second result, on request; `upstream_second` is its upstream gradient.
  FUSEDLOSS_HD T second(const Row<T>& row) const { return row.lse(); }
};

// torch.nn.functional.cross_entropy with class indices, smoothing e over C classes and z-loss lambda:
// w_y (1 - e) ce + e / C * sum_c w_c (lse - z_c) + lambda lse^2.
template <class T, class Logit, bool kSmooth>
struct CrossEntropyWith : OfRow<T> {
  using Sum = std::conditional_t<kSmooth, SumLinear, SumNone>;
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
struct SoftCrossEntropyWith : OfRow<T> {
  using Sum = SumLinear;
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
struct Nll : OfRow<T> {
  static constexpr bool mean_by_weight = true, reads_row = false;
  Unchanged<T> logit;

  FUSEDLOSS_HD Nll(const double*, int64_t) {}
  FUSEDLOSS_HD T value(T logit, T weight) const { return -weight * logit; }
  FUSEDLOSS_HD T gradient(T weight, T upstream) const { return -weight * upstream; }
};

// q^gamma ce, times a factor alpha. With rho = ce p / q -> 1 as q -> 0 the gradient is q^gamma (1 + gamma rho), which
// has no singularity left for any gamma >= 0.
template <class T>
struct Focal : OfRow<T> {
  static constexpr bool takes_power = true;
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
template <class T, class SumOfRow>
struct LogProbsWith : OfRow<T> {
  using Sum = SumOfRow;
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
struct LogProbs : LogProbsWith<T, SumEntropy> {
  using Specialised = LogProbsWith<T, SumNone>;
  static bool applies(const double* params) { return params[1] == 0; }     // no entropy asked for
  static constexpr Range params[] = {{0, kInfinity, true}, {-kInfinity}};  // temperature, entropy
  FUSEDLOSS_HD LogProbs(const double* params, int64_t classes) : LogProbsWith<T, SumEntropy>(params, classes) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_SOFTMAX(X)              \
  X(cross_entropy, CrossEntropy)          \
  X(soft_cross_entropy, SoftCrossEntropy) \
  X(nll, Nll)                             \
  X(focal, Focal)                         \
  X(log_probs, LogProbs)
