// The asymmetric loss of Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification": a focal loss whose
// exponent is another one for each side, and that forgives negatives by a margin, `clip`.
//
// With pm = max(p - clip, 0), m = q t + pm (1 - t) is the probability of being wrong, and the loss is
// m^gamma (-t log p - (1 - t) log(1 - pm)), where gamma is gamma_pos for a target of 1, gamma_neg for one of 0, and
// lies between them for others.
#pragma once

#include "math.h"
#include "range.h"
#include "result_dtype.h"

namespace fusedloss::FUSEDLOSS_ISA {

// pm, the slope of pm, and -log(1 - pm) with its slope: of a target of 0.
template <class T>
struct Forgiven {
  T pm, slope, loss, loss_slope;
};

// log(1 - pm) from both, and m^y.
struct ExactPowers {
  // The rounding of the rest is put back where it is close to 1, so that tiny pm keep all their digits.
  template <class T>
  static FUSEDLOSS_HD T log_of_rest(T pm, T rest) {
    return log(rest) + select(pm < T(0.5), divide(-pm - (rest - T(1)), rest), T(0));
  }
  template <class T>
  static FUSEDLOSS_HD T power_of(T m, T y) {
    return power(m, y);
  }
};
struct PowersForHalves {
  template <class T>
  static FUSEDLOSS_HD T log_of_rest(T pm, T rest) {
    return log_for_halves(rest, pm);
  }
  template <class T>
  static FUSEDLOSS_HD T power_of(T m, T y) {
    const T logarithm = log_for_halves(m, T(1) - m);
    return exp(y * (logarithm < lowest<T>() ? lowest<T>() : logarithm));
  }
};

template <class T, class Powers>
struct ByMargin {
  T clip;
  FUSEDLOSS_HD Forgiven<T> operator()(const Sigmoid<T>& s, T) const {
    const bool counts = s.p > clip;
    const T pm = select(counts, s.p - clip, T(0)), rest = s.q + clip, pq = s.p * s.q;
    return {pm, select(counts, pq, T(0)), select(counts, -Powers::log_of_rest(pm, rest), T(0)),
            select(counts, divide(pq, rest), T(0))};
  }
};
template <class T>
struct Nothing {
  FUSEDLOSS_HD Forgiven<T> operator()(const Sigmoid<T>& s, T x) const {
    return {s.p, s.p * s.q, select(x < T(0), T(0), x) + s.softplus, s.p};
  }
};

template <class T, class Forgives, class Powers>
struct AsymmetricWith {
  static constexpr bool of_difference = false;
  static constexpr ResultDType result = ResultDType::OfInput;
  static constexpr bool takes_class_indices = true, is_long = true;
  T gamma_neg, gamma_more;  // for a target of 1
  Forgives forgives;

  FUSEDLOSS_HD AsymmetricWith(const double* params, Forgives forgives)
      : gamma_neg(T(params[0])), gamma_more(T(params[1] - params[0])), forgives(forgives) {}

  FUSEDLOSS_HD T gamma_of(T t) const { return gamma_neg + gamma_more * t; }
  FUSEDLOSS_HD T of_one(const Sigmoid<T>& s, T x) const { return select(x < T(0), -x, T(0)) + s.softplus; }

  FUSEDLOSS_HD T value(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    const Forgiven<T> zero = forgives(s, x);
    const T other = T(1) - t;
    return Powers::power_of(s.q * t + zero.pm * other, gamma_of(t)) * (t * of_one(s, x) + other * zero.loss);
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    const Forgiven<T> zero = forgives(s, x);
    const T other = T(1) - t, gamma = gamma_of(t);
    const T m = s.q * t + zero.pm * other, m_slope = zero.slope * other - s.p * s.q * t;
    const T ce = t * of_one(s, x) + other * zero.loss, ce_slope = other * zero.loss_slope - t * s.q;
    // Not by the power gamma - 1, which is infinite at m = 0: m_slope is at most as large as m where m is close to 0.
    return Powers::power_of(m, gamma) * (ce_slope + gamma * ce * select(m > T(0), divide(m_slope, m), T(0)));
  }
};

template <class T, class Powers>
struct AsymmetricBy : AsymmetricWith<T, ByMargin<T, Powers>, Powers> {
  using Specialised = AsymmetricWith<T, Nothing<T>, Powers>;  // whose logarithm is the softplus
  static bool applies(const double* params) { return params[2] == 0; }
  static Specialised specialised(const double* params) { return Specialised(params, {}); }

  static constexpr Range params[] = {{0}, {0}, {0, 1}};  // gamma_neg, gamma_pos, clip
  explicit FUSEDLOSS_HD AsymmetricBy(const double* params)
      : AsymmetricWith<T, ByMargin<T, Powers>, Powers>(params, ByMargin<T, Powers>{T(params[2])}) {}
};
template <class T>
struct Asymmetric : AsymmetricBy<T, ExactPowers> {
  using ForHalves = AsymmetricBy<T, PowersForHalves>;  // on a GPU, whose special functions make it faster
  explicit FUSEDLOSS_HD Asymmetric(const double* params) : AsymmetricBy<T, ExactPowers>(params) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA
