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
    return z <= delta ? T(0.5) * z * z : delta * (z - T(0.5) * delta);
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const T z = x - t;
    const T above = z < -delta ? -delta : z;
    return z > delta ? delta : above;
  }
};

// Lin et al. 2017, "Focal Loss for Dense Object Detection", with torchvision's linear meaning of soft targets:
// m = p (1 - t) + q t is the probability of being wrong, and the loss is alpha_t m^gamma ce.
// No division by m = 0 and no power gamma - 1, so that every gamma >= 0 and every logit gives a finite value and gradient.
template <class T>
struct SigmoidFocal {
  static constexpr bool of_difference = false;
  T alpha_at_0, alpha_slope, gamma;

  static bool valid(const double* params) { return params[1] >= 0; }
  explicit FUSEDLOSS_HD SigmoidFocal(const double* params)
      : alpha_at_0(params[0] >= 0 ? T(1 - params[0]) : T(1)),  // a negative alpha means no alpha
        alpha_slope(params[0] >= 0 ? T(2 * params[0] - 1) : T(0)),
        gamma(T(params[1])) {}

  struct Terms {
    T p, q, m, ce, factor;
  };
  FUSEDLOSS_HD Terms terms(T x, T t) const {
    const T u = exp(-abs(x)), larger = T(1) / (T(1) + u), smaller = u * larger;
    Terms r;
    r.p = select(x < 0, smaller, larger);
    r.q = select(x < 0, larger, smaller);
    r.m = r.p * (T(1) - t) + r.q * t;
    r.ce = select(x < 0, T(0), x) - x * t + log1p(u);
    r.factor = (alpha_at_0 + alpha_slope * t) * power(r.m, gamma);
    return r;
  }
  FUSEDLOSS_HD T value(T x, T t) const {
    const Terms r = terms(x, t);
    return r.factor * r.ce;
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const Terms r = terms(x, t);
    const T slope = (T(1) - T(2) * t) * select(r.m > T(0), r.p * r.q / r.m, T(0));  // m' / m, bounded by 1
    return r.factor * (gamma * slope * r.ce + (r.p * (T(1) - t) - r.q * t));
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_POINTWISE(X) \
  X(huber, Huber)              \
  X(sigmoid_focal, SigmoidFocal)
