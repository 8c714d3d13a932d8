// Losses of a distribution: the Kullback-Leibler divergence, and the negative log-likelihood of counts and of normal
// numbers.
#pragma once

#include "functions.h"
#include "range.h"
#include "result_dtype.h"

namespace fusedloss::FUSEDLOSS_ISA {

// torch.nn.functional.kl_div of log-probabilities x, t (log(t) - x): -t x for t = 0, NaN for a negative t.
template <class T>
struct KlDiv {
  static constexpr bool of_difference = false, broadcasts = true, takes_integers = false, target_first = true;
  static constexpr ResultDType result = ResultDType::Promoted;
  explicit FUSEDLOSS_HD KlDiv(const double*) {}

  FUSEDLOSS_HD T value(T x, T t) const { return t * (select(t == T(0), T(0), functions::log(t)) - x); }
  FUSEDLOSS_HD T grad(T, T t) const { return -t; }
  FUSEDLOSS_HD T grad_target(T x, T t) const { return functions::log(t) + T(1) - x; }
};

// The same of a logarithm t of the target's probability.
template <class T>
struct KlDivLogTarget {
  static constexpr bool of_difference = false, broadcasts = true, takes_integers = false, target_first = true;
  static constexpr ResultDType result = ResultDType::Promoted;
  explicit FUSEDLOSS_HD KlDivLogTarget(const double*) {}

  FUSEDLOSS_HD T value(T x, T t) const { return functions::exp(t) * (t - x); }
  FUSEDLOSS_HD T grad(T, T t) const { return -functions::exp(t); }
  FUSEDLOSS_HD T grad_target(T x, T t) const { return functions::exp(t) * ((t - x) + T(1)); }
};

// Stirling's approximation of log(t!), as torch has it: 0 up to a count of 1.
struct Stirling {
  template <class T>
  static FUSEDLOSS_HD T of(T t) {
    const T log_t = functions::log(t), half_log_two_pi = T(0.91893853320467274178);
    return select(t <= T(1), T(0), t * (log_t - T(1)) + (T(0.5) * log_t + half_log_two_pi));
  }
  template <class T>
  static FUSEDLOSS_HD T slope(T t) {
    return select(t <= T(1), T(0), functions::log(t) + T(0.5) / t);
  }
};
struct NoConstant {
  template <class T>
  static FUSEDLOSS_HD T of(T) {
    return T(0);
  }
  template <class T>
  static FUSEDLOSS_HD T slope(T) {
    return T(0);
  }
};

struct OfCounts {
  static constexpr bool of_difference = false, broadcasts = true;
  static constexpr ResultDType result = ResultDType::Promoted;
};

// torch.nn.functional.poisson_nll_loss of a count t and the logarithm x of its expectation.
template <class T, class Constant>
struct PoissonNllWith : OfCounts {
  FUSEDLOSS_HD T value(T x, T t) const { return functions::exp(x) - t * x + Constant::of(t); }
  FUSEDLOSS_HD T grad(T x, T t) const { return functions::exp(x) - t; }
  FUSEDLOSS_HD T grad_target(T x, T t) const { return Constant::slope(t) - x; }
};
template <class T>
struct PoissonNll : PoissonNllWith<T, Stirling> {
  using Specialised = PoissonNllWith<T, NoConstant>;  // without a logarithm
  static bool applies(const double* params) { return params[0] == 0; }
  static Specialised specialised(const double*) { return {}; }

  static constexpr Range params[] = {{-kInfinity}};  // full: whether the constant is added
  explicit FUSEDLOSS_HD PoissonNll(const double*) {}
};

// The same of the expectation x itself: NaN below -eps.
template <class T, class Constant>
struct PoissonNllRateWith : OfCounts {
  T eps;

  explicit FUSEDLOSS_HD PoissonNllRateWith(double eps) : eps(T(eps)) {}
  FUSEDLOSS_HD T value(T x, T t) const { return x - t * functions::log(x + eps) + Constant::of(t); }
  FUSEDLOSS_HD T grad(T x, T t) const { return T(1) - t / (x + eps); }
  FUSEDLOSS_HD T grad_target(T x, T t) const { return Constant::slope(t) - functions::log(x + eps); }
};
template <class T>
struct PoissonNllRate : PoissonNllRateWith<T, Stirling> {
  using Specialised = PoissonNllRateWith<T, NoConstant>;
  static bool applies(const double* params) { return params[1] == 0; }
  static Specialised specialised(const double* params) { return Specialised(params[0]); }

  static constexpr Range params[] = {{-kInfinity}, {-kInfinity}};  // eps, full
  explicit FUSEDLOSS_HD PoissonNllRate(const double* params) : PoissonNllRateWith<T, Stirling>(params[0]) {}
};

// torch.nn.functional.gaussian_nll_loss of an expectation x, a sample t and a variance v of eps at least, to whose own
// gradient that bound is no matter. NaN for a negative variance.
template <class T>
struct GaussianNll {
  static constexpr bool of_difference = true, takes_third = true;
  static constexpr ResultDType result = ResultDType::Promoted;
  T eps, constant;

  static constexpr Range params[] = {{-kInfinity}, {-kInfinity}};  // eps, full: whether the constant is added
  explicit FUSEDLOSS_HD GaussianNll(const double* params)
      : eps(T(params[0])), constant(params[1] == 0 ? T(0) : T(0.91893853320467274178)) {}

  // What torch raises for.
  static FUSEDLOSS_HD bool is_negative(T v) { return v < T(0); }
  FUSEDLOSS_HD T bounded(T v) const { return select(is_negative(v), T(NAN), select(v < eps, eps, v)); }

  FUSEDLOSS_HD T value(T x, T t, T v) const {
    const T variance = bounded(v), z = x - t;
    return T(0.5) * (functions::log(variance) + z * z / variance) + constant;
  }
  FUSEDLOSS_HD T grad(T x, T t, T v) const { return (x - t) / bounded(v); }
  FUSEDLOSS_HD T grad_third(T x, T t, T v) const {
    const T variance = bounded(v), z = x - t;
    return T(0.5) / variance - T(0.5) * (z * z / variance) / variance;
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
