// Losses of a label, 1 or -1, and of how far the input lies on its side.
#pragma once

#include "math.h"
#include "on_slope.h"
#include "range.h"
#include "result_dtype.h"

namespace fusedloss::FUSEDLOSS_ISA {

// torch.nn.functional.hinge_embedding_loss: x for a label of 1, max(0, margin - x) for one of -1, and, as in torch, the
// sum of both for any other.
template <class T>
struct HingeEmbedding {
  static constexpr bool of_difference = false, broadcasts = true, takes_integers = true, target_first = true;
  static constexpr ResultDType result = ResultDType::OfInput;
  T margin;

  static constexpr Range params[] = {{-kInfinity}};
  explicit FUSEDLOSS_HD HingeEmbedding(const double* params) : margin(T(params[0])) {}

  FUSEDLOSS_HD T value(T x, T t) const {
    const T missing = margin - x, of_minus_one = select(missing < T(0), T(0), missing);
    return select(t == T(1), T(0), of_minus_one) + select(t == T(-1), T(0), x);
  }
  FUSEDLOSS_HD T grad(T x, T t) const {
    const T of_minus_one = select(on_slope(margin - x), T(1), T(0));
    return select(t == T(-1), T(0), T(1)) - select(t == T(1), T(0), of_minus_one);
  }
};

// torch.nn.functional.soft_margin_loss, log(1 + e^(-t x)).
template <class T>
struct SoftMargin {
  static constexpr bool of_difference = false, takes_integers = true;
  static constexpr ResultDType result = ResultDType::OfInput;
  explicit FUSEDLOSS_HD SoftMargin(const double*) {}

  FUSEDLOSS_HD T value(T x, T t) const {
    const T z = x * t;
    return select(z < T(0), -z, T(0)) + sigmoid(z).softplus;
  }
  FUSEDLOSS_HD T grad(T x, T t) const { return -t * sigmoid(x * t).q; }
};

// torch.nn.functional.margin_ranking_loss of two scores and the label of which is the higher one: max(0, margin - y (x
// - t)).
template <class T>
struct MarginRanking {
  static constexpr bool of_difference = true, takes_third = true;
  static constexpr ResultDType result = ResultDType::Promoted;
  T margin;

  static constexpr Range params[] = {{-kInfinity}};
  explicit FUSEDLOSS_HD MarginRanking(const double* params) : margin(T(params[0])) {}

  FUSEDLOSS_HD T missing(T x, T t, T y) const { return -y * (x - t) + margin; }

  FUSEDLOSS_HD T value(T x, T t, T y) const {
    const T m = missing(x, t, y);
    return select(m < T(0), T(0), m);
  }
  FUSEDLOSS_HD T grad(T x, T t, T y) const { return select(on_slope(missing(x, t, y)), -y, T(0)); }
  FUSEDLOSS_HD T grad_third(T x, T t, T y) const { return select(on_slope(missing(x, t, y)), -(x - t), T(0)); }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
