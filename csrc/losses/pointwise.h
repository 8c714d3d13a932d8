// The pointwise losses: value(x, t) and grad(x, t) = d value / d x per element, grad_target(x, t) = d value / d t. One
// of three operands takes the third after x and t, and has grad_third(x, t, third).
//
// Those of margins and of distributions stand in margin.h and divergence.h, the asymmetric one in asymmetric.h.
//
// A functor takes its parameters in the order of the Python function and holds them in the arithmetic type T. To add a
// loss, write its functor and its line in the list; ops, autograd, bindings, tests and benchmarks expand from the list.
#pragma once

#include "asymmetric.h"
#include "divergence.h"
#include "margin.h"
#include "math.h"
#include "range.h"
#include "result_dtype.h"

namespace fusedloss::FUSEDLOSS_ISA {

// A loss that reads only the difference x - t: d/dt = -d/dx, and inputs of different shapes broadcast.
template <class T>
struct OfDifference {
  static constexpr bool of_difference = true;
  static constexpr ResultDType result = ResultDType::Promoted;
};

// torch.nn.functional.mse_loss
template <class T>
struct Mse : OfDifference<T> {
  explicit FUSEDLOSS_HD Mse(const double*) {}
  FUSEDLOSS_HD T value(T x, T t) const { return (x - t) * (x - t); }
  FUSEDLOSS_HD T grad(T x, T t) const { return T(2) * (x - t); }
};

// torch.nn.functional.l1_loss; its slope is 0 at 0, and where an input is NaN.
template <class T>
struct L1 : OfDifference<T> {
  explicit FUSEDLOSS_HD L1(const double*) {}
  FUSEDLOSS_HD T value(T x, T t) const { return abs(x - t); }
  FUSEDLOSS_HD T grad(T x, T t) const { return T(x > t) - T(x < t); }
};

// torch.nn.functional.smooth_l1_loss: quadratic within beta, with a slope of 1 outside; with a beta of 0 it is the L1.
template <class T>
struct SmoothL1 : OfDifference<T> {
  // Two products take the place of a division by beta. The first one is by a power of two, so that the second one's
  // factor is a normal number for every beta that T has.
  T beta, scale, inverse;

  static constexpr Range params[] = {{0}};
  explicit FUSEDLOSS_HD SmoothL1(const double* params)
      : beta(T(params[0])),
        scale(beta < T(0x1p-100)  ? T(0x1p60)
              : beta > T(0x1p100) ? T(0x1p-60)
                                  : T(1)),
        inverse(T(1 / (double(beta) * double(scale)))) {}

  FUSEDLOSS_HD T in_betas(T z) const { return z * scale * inverse; }

  FUSEDLOSS_HD T value(T x, T t) const {
    const T z = x - t;
    return select(abs(z) < beta, T(0.5) * z * in_betas(z), abs(z) - T(0.5) * beta);
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const T z = x - t;
    const T above = select(z <= -beta, T(-1), in_betas(z));
    return select(z >= beta, T(z > 0), above);
  }
};

// torch.nn.functional.huber_loss: quadratic within delta, linear outside.
template <class T>
struct Huber : OfDifference<T> {
  static constexpr ResultDType result = ResultDType::Same;
  T delta;

  static constexpr Range params[] = {{0, kInfinity, true}};
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

// log(x) and log(1 - x) of a probability.
struct ExactLogarithms {
  template <class T>
  static FUSEDLOSS_HD T of(T x) {
    return log(x);
  }
  template <class T>
  static FUSEDLOSS_HD T of_rest(T x) {
    return log1p(-x);
  }
};
struct LogarithmsForHalves {
  template <class T>
  static FUSEDLOSS_HD T of(T x) {
    return log_for_halves(x, T(1) - x);
  }
  template <class T>
  static FUSEDLOSS_HD T of_rest(T x) {
    return log_for_halves(T(1) - x, x);
  }
};

// torch.nn.functional.binary_cross_entropy of probabilities x: logarithms are -100 at least, and NaN outside [0, 1].
template <class T, class Logarithms>
struct BinaryCrossEntropyWith {
  static constexpr bool of_difference = false;
  static constexpr ResultDType result = ResultDType::Same;
  static constexpr bool takes_class_indices = true;
  explicit FUSEDLOSS_HD BinaryCrossEntropyWith(const double*) {}

  // What torch raises for.
  static FUSEDLOSS_HD bool is_probability(T p) { return bool(int(p >= T(0)) & int(p <= T(1))); }

  FUSEDLOSS_HD T value(T x, T t) const {
    const T log_x = Logarithms::of(x), log_rest = Logarithms::of_rest(x);
    const T of_one = log_x < T(-100) ? T(-100) : log_x, of_zero = log_rest < T(-100) ? T(-100) : log_rest;
    const bool both = bool(int(is_probability(x)) & int(is_probability(t)));
    return select(both, (t - T(1)) * of_zero - t * of_one, T(NAN));
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const T variance = (T(1) - x) * x;
    return divide(x - t, variance > T(1e-12) ? variance : T(1e-12));
  }
  FUSEDLOSS_HD T grad_target(T x, T) const { return Logarithms::of_rest(x) - Logarithms::of(x); }
};
template <class T>
struct BinaryCrossEntropy : BinaryCrossEntropyWith<T, ExactLogarithms> {
  using ForHalves = BinaryCrossEntropyWith<T, LogarithmsForHalves>;  // on a GPU, whose special functions make it faster
  explicit FUSEDLOSS_HD BinaryCrossEntropy(const double* params) : BinaryCrossEntropyWith<T, ExactLogarithms>(params) {}
};

// torch.nn.functional.binary_cross_entropy_with_logits, as softplus(-x) for a target of 1 and softplus(x) for one of 0:
// no digit of a confident logit is lost.
template <class T>
struct WithPositiveWeight {
  static constexpr bool takes_third = true, of_difference = false;

  FUSEDLOSS_HD T value(T x, T t, T weight) const {
    const T wanted = weight * t, other = T(1) - t;
    return select(x < T(0), -wanted * x, other * x) + (wanted + other) * sigmoid(x).softplus;
  }
  FUSEDLOSS_HD T grad(T x, T t, T weight) const {
    const Sigmoid<T> s = sigmoid(x);
    return (T(1) - t) * s.p - weight * t * s.q;
  }
  FUSEDLOSS_HD T grad_target(T x, T, T weight) const {
    const T softplus = sigmoid(x).softplus;
    return weight * (select(x < T(0), -x, T(0)) + softplus) - (select(x < T(0), T(0), x) + softplus);
  }
};

template <class T>
struct BinaryCrossEntropyWithLogits {
  using WithPositiveWeight = FUSEDLOSS_ISA::WithPositiveWeight<T>;  // where a weight of the positive term is given
  static constexpr bool of_difference = false;
  static constexpr ResultDType result = ResultDType::OfTarget;
  static constexpr bool takes_class_indices = true;
  explicit FUSEDLOSS_HD BinaryCrossEntropyWithLogits(const double*) {}

  FUSEDLOSS_HD T value(T x, T t) const { return select(x < T(0), -t * x, (T(1) - t) * x) + sigmoid(x).softplus; }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    return (T(1) - t) * s.p - t * s.q;  // p - t without cancellation
  }
  FUSEDLOSS_HD T grad_target(T x, T) const { return -x; }
};

// The same of a target that is `off` for 0 and `on` for 1: of smoothed labels, whose class indices stay what they are.
template <class T>
struct SmoothedBinaryCrossEntropy {
  static constexpr bool of_difference = false;
  static constexpr ResultDType result = ResultDType::OfInput;
  static constexpr bool takes_class_indices = true;
  T off, rest, span;  // rest: 1 - on, with all its digits

  static constexpr Range params[] = {{0, 1}, {0, 1}};  // off, on
  explicit FUSEDLOSS_HD SmoothedBinaryCrossEntropy(const double* params)
      : off(T(params[0])), rest(T(1 - params[1])), span(T(params[1] - params[0])) {}

  FUSEDLOSS_HD T wanted(T t) const { return off + span * t; }
  FUSEDLOSS_HD T other(T t) const { return rest + span * (T(1) - t); }

  FUSEDLOSS_HD T value(T x, T t) const { return select(x < T(0), -wanted(t) * x, other(t) * x) + sigmoid(x).softplus; }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const Sigmoid<T> s = sigmoid(x);
    return other(t) * s.p - wanted(t) * s.q;
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
  static constexpr ResultDType result = ResultDType::OfInput;
  static constexpr bool takes_class_indices = true;
  T alpha_at_0, alpha_slope;
  Modulation modulation;

  FUSEDLOSS_HD SigmoidFocalWith(double alpha, Modulation m)
      : alpha_at_0(alpha >= 0 ? T(1 - alpha) : T(1)),  // a negative alpha means no alpha
        alpha_slope(alpha >= 0 ? T(2 * alpha - 1) : T(0)),
        modulation(m) {}

  FUSEDLOSS_HD T alpha_of(T t) const { return alpha_at_0 + alpha_slope * t; }
  FUSEDLOSS_HD T wrong(const Sigmoid<T>& s, T t) const { return s.p * (T(1) - t) + s.q * t; }
  FUSEDLOSS_HD T ce(const Sigmoid<T>& s, T x, T t) const {
    return select(x < T(0), -t * x, (T(1) - t) * x) + s.softplus;
  }

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
  using Specialised = SigmoidFocalWith<T, GammaTwo<T>>;  // over twice as fast, for the gamma nearly everyone uses
  static bool applies(const double* params) { return params[1] == 2; }
  static Specialised specialised(const double* params) { return Specialised(params[0], {}); }

  static constexpr Range params[] = {{-kInfinity}, {0}};  // alpha, gamma
  explicit FUSEDLOSS_HD SigmoidFocal(const double* params)
      : SigmoidFocalWith<T, AnyGamma<T>>(params[0], {T(params[1])}) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_POINTWISE(X)                                      \
  X(mse, Mse)                                                       \
  X(l1, L1)                                                         \
  X(smooth_l1, SmoothL1)                                            \
  X(huber, Huber)                                                   \
  X(binary_cross_entropy, BinaryCrossEntropy)                       \
  X(binary_cross_entropy_with_logits, BinaryCrossEntropyWithLogits) \
  X(sigmoid_focal, SigmoidFocal)                                    \
  X(hinge_embedding, HingeEmbedding)                                \
  X(soft_margin, SoftMargin)                                        \
  X(kl_div, KlDiv)                                                  \
  X(kl_div_log_target, KlDivLogTarget)                              \
  X(poisson_nll, PoissonNll)                                        \
  X(poisson_nll_rate, PoissonNllRate)                               \
  X(margin_ranking, MarginRanking)                                  \
  X(gaussian_nll, GaussianNll)                                      \
  X(smoothed_binary_cross_entropy, SmoothedBinaryCrossEntropy)      \
  X(asymmetric, Asymmetric)
