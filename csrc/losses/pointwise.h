// The pointwise losses: value(x, t) and grad(x, t) = d value / d x per element.
//
// A functor takes its parameters in the order of the Python function and holds them in the arithmetic type T. To add a
// loss, write its functor and its line in the list; ops, autograd, bindings, tests and benchmarks expand from the list.
#pragma once

#include "math.h"

namespace fusedloss::FUSEDLOSS_ISA {

// torch.nn.functional.huber_loss: quadratic within delta, linear outside.
template <class T>
struct Huber {
  static constexpr bool of_difference = true;  // depends on x - t alone, so that d/dt = -d/dx
  T delta;

  static bool valid(const double* params) { return params[0] > 0; }
  explicit FUSEDLOSS_HD Huber(const double* params) : delta(T(params[0])) {}

  FUSEDLOSS_HD T value(T x, T t) const {
    const T z = abs(x - t);
    return select(z <= delta, T(0.5) * z * z, delta * (z - T(0.5) * delta));
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const T z = x - t;
    const T above = z < -delta ? -delta : z;
    return z > delta ? delta : above;
  }
};

// m^gamma and m^(gamma - 1), the second times pq: bounded, because pq <= m where it matters, and 0 at m = 0.
template <class T>
struct AnyGamma {
  T gamma;
  FUSEDLOSS_HD T power_of(T m) const { return power(m, gamma); }
  FUSEDLOSS_HD T slope(T m, T pq) const { return power_of(m) * select(m > T(0), pq / m, T(0)); }
};
template <class T>
struct GammaTwo {
  static constexpr T gamma = 2;
  FUSEDLOSS_HD T power_of(T m) const { return m * m; }
  FUSEDLOSS_HD T slope(T m, T pq) const { return m * pq; }
};

// Lin et al. 2017, "Focal Loss for Dense Object Detection", with torchvision's linear meaning of soft targets:
// m = p (1 - t) + q t is the probability of being wrong, and the loss is alpha_t m^gamma ce.
// No division by m = 0 and no power gamma - 1, so that every gamma >= 0 and every logit gives a finite value and
// gradient.
template <class T, class Modulation>
struct SigmoidFocalWith {
  static constexpr bool of_difference = false;
  T alpha_at_0, alpha_slope;
  Modulation modulation;

  FUSEDLOSS_HD SigmoidFocalWith(double alpha, Modulation m)
      : alpha_at_0(alpha >= 0 ? T(1 - alpha) : T(1)),  // a negative alpha means no alpha
        alpha_slope(alpha >= 0 ? T(2 * alpha - 1) : T(0)),
        modulation(m) {}

  FUSEDLOSS_HD T alpha_of(T t) const { return alpha_at_0 + alpha_slope * t; }
  FUSEDLOSS_HD T wrong(const Sigmoid<T>& s, T t) const { return s.p * (T(1) - t) + s.q * t; }
  FUSEDLOSS_HD T ce(const Sigmoid<T>& s, T x, T t) const { return select(x < 0, T(0), x) - x * t + s.softplus; }

  FUSEDLOSS_HD T value(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    return alpha_of(t) * modulation.power_of(wrong(s, t)) * ce(s, x, t);
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    const T m = wrong(s, t), error = s.p * (T(1) - t) - s.q * t;  // p - t without cancellation
    const T slope = modulation.gamma * (T(1) - T(2) * t) * modulation.slope(m, s.p * s.q);
    return alpha_of(t) * (slope * ce(s, x, t) + modulation.power_of(m) * error);
  }
};

template <class T>
struct SigmoidFocal : SigmoidFocalWith<T, AnyGamma<T>> {
  using Twin = SigmoidFocalWith<T, GammaTwo<T>>;  // over twice as fast, for the gamma nearly everyone uses
  static bool twin_fits(const double* params) { return params[1] == 2; }
  static Twin twin(const double* params) { return Twin(params[0], {}); }

  static bool valid(const double* params) { return params[1] >= 0; }
  explicit FUSEDLOSS_HD SigmoidFocal(const double* params)
      : SigmoidFocalWith<T, AnyGamma<T>>(params[0], {T(params[1])}) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_POINTWISE(X) \
  X(huber, Huber)              \
  X(sigmoid_focal, SigmoidFocal)

// Those that also take class indices: a target of 1 in the column that the index names, of 0 in every other.
#define FUSEDLOSS_INDEXED(X) X(sigmoid_focal, SigmoidFocal)
