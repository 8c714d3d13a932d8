// Losses of whole rows that are known by a few sums over their columns: dot products, norms, distances, hinges.
//
// A functor reads one number of each operand at a column. `terms` gives what the column adds to the sums, `value` the
// loss of a row's sums, `gradient` the coefficients that the gradient at every column is made of, and `gradients` makes
// it, one for each operand.
#pragma once

#include "functions.h"
#include "math.h"
#include "on_slope.h"
#include "range.h"

namespace fusedloss::FUSEDLOSS_ISA {

// What a functor reads of a row beside its sums.
template <class T>
struct RowFacts {
  T label;   // 1, -1, or 0 for any other
  T own;     // the score in the column of the target class
  T weight;  // of the target class, over the number of columns
};

// torch.nn.functional.cosine_embedding_loss: 1 - cos for a label of 1, max(0, cos - margin) for one of -1, 0 for any
// other. At the margin itself the slope is that of torch's clamp_min.
template <class T>
struct CosineEmbedding {
  static constexpr int operands = 2, sums = 3, coefficients = 3;
  static constexpr bool takes_labels = true;
  T margin;

  static constexpr Range params[] = {{-kInfinity}};
  explicit FUSEDLOSS_HD CosineEmbedding(const double* params) : margin(T(params[0])) {}

  static FUSEDLOSS_HD void terms(const T (&x)[2], const RowFacts<T>&, T (&terms)[3]) {
    terms[0] = x[0] * x[1];
    terms[1] = x[0] * x[0];
    terms[2] = x[1] * x[1];
  }

  // Under one root, as in torch: an overflow of the product makes a cosine of 0.
  struct Cosine {
    T first, second, norms, cos;
    explicit FUSEDLOSS_HD Cosine(const T (&sums)[3]) : first(sums[1] + T(1e-12)), second(sums[2] + T(1e-12)) {
      norms = functions::sqrt(first * second);
      cos = sums[0] / norms;
    }
  };

  FUSEDLOSS_HD T value(const T (&sums)[3], const RowFacts<T>& row) const {
    const T cos = Cosine(sums).cos, above = cos - margin;
    if (row.label == T(1)) return T(1) - cos;
    if (row.label == T(-1)) return above < T(0) ? T(0) : above;
    return T(0);
  }
  FUSEDLOSS_HD void gradient(const T (&sums)[3], const RowFacts<T>& row, T upstream, T (&c)[3]) const {
    const Cosine of(sums);
    T slope = T(0);
    if (row.label == T(1)) slope = -upstream;
    if (row.label == T(-1) && on_slope(of.cos - margin)) slope = upstream;
    c[0] = slope / of.norms;
    c[1] = -slope * of.cos / of.first;
    c[2] = -slope * of.cos / of.second;
  }
  static FUSEDLOSS_HD void gradients(const T (&x)[2], const RowFacts<T>&, const T (&c)[3], T (&grads)[2]) {
    grads[0] = c[0] * x[1] + c[1] * x[0];
    grads[1] = c[0] * x[0] + c[2] * x[1];
  }
};

// torch.nn.functional.triplet_margin_loss for distances of norm 1 or 2: max(0, margin + d(a, p) - d(a, n)). With kSwap
// the smaller one of d(a, n) and d(p, n) is taken, and where they are equal both get half of the slope.
template <class T, bool kSquared, bool kSwap>
struct Triplet {
  static constexpr int operands = 3, sums = kSwap ? 3 : 2, coefficients = sums;
  T margin, eps;

  explicit FUSEDLOSS_HD Triplet(const double* params) : margin(T(params[0])), eps(T(params[2])) {}

  static FUSEDLOSS_HD T term(T difference) { return kSquared ? difference * difference : abs(difference); }
  static FUSEDLOSS_HD T distance(T sum) { return kSquared ? functions::sqrt(sum) : sum; }

  FUSEDLOSS_HD void terms(const T (&x)[3], const RowFacts<T>&, T (&terms)[sums]) const {
    terms[0] = term(x[0] - x[1] + eps);
    terms[1] = term(x[0] - x[2] + eps);
    if constexpr (kSwap) terms[2] = term(x[1] - x[2] + eps);
  }

  FUSEDLOSS_HD T missing(const T (&sums_)[sums]) const {
    T negative = distance(sums_[1]);
    if constexpr (kSwap) {
      const T swapped = distance(sums_[2]);
      if (!(negative <= swapped)) negative = negative != negative ? negative : swapped;
    }
    return margin + distance(sums_[0]) - negative;
  }
  FUSEDLOSS_HD T value(const T (&sums_)[sums], const RowFacts<T>&) const {
    const T m = missing(sums_);
    return m < T(0) ? T(0) : m;
  }
  FUSEDLOSS_HD void gradient(const T (&sums_)[sums], const RowFacts<T>&, T upstream, T (&c)[sums]) const {
    const T slope = on_slope(missing(sums_)) ? upstream : T(0);
    c[0] = by_distance(slope, sums_[0]);
    if constexpr (kSwap) {
      const T negative = distance(sums_[1]), swapped = distance(sums_[2]), half = slope / T(2);
      const T given = negative == swapped ? half : slope;
      c[1] = by_distance(negative > swapped ? T(0) : -given, sums_[1]);
      c[2] = by_distance(swapped > negative ? T(0) : -given, sums_[2]);
    } else {
      c[1] = by_distance(-slope, sums_[1]);
    }
  }
  FUSEDLOSS_HD void gradients(const T (&x)[3], const RowFacts<T>&, const T (&c)[sums], T (&grads)[3]) const {
    const T positive = c[0] * direction(x[0] - x[1] + eps), negative = c[1] * direction(x[0] - x[2] + eps);
    grads[0] = positive + negative;
    grads[1] = -positive;
    grads[2] = -negative;
    if constexpr (kSwap) {
      const T swapped = c[2] * direction(x[1] - x[2] + eps);
      grads[1] += swapped;
      grads[2] -= swapped;
    }
  }

 private:
  // The derivative of a distance by a difference is direction(difference), times this of a slope of 1.
  static FUSEDLOSS_HD T by_distance(T slope, T sum) {
    if constexpr (!kSquared) return slope;
    const T d = distance(sum);
    return d == T(0) ? T(0) : slope / d;
  }
  static FUSEDLOSS_HD T direction(T difference) {
    if constexpr (kSquared) return difference;
    return select(difference > T(0), T(1), T(0)) - select(difference < T(0), T(1), T(0));
  }
};

template <class T>
struct TripletMargin {
  static constexpr int operands = 3;
  static constexpr Range params[] = {{0, kInfinity, true}, {1, 2}, {-kInfinity}, {0, 1}};  // margin, p, eps, swap
  static constexpr int whole = 1;
  template <class F>
  static auto with_form(const double* params, F f) {
    const bool swap = params[3] != 0;
    if (params[1] == 2) return swap ? f(Triplet<T, true, true>(params)) : f(Triplet<T, true, false>(params));
    return swap ? f(Triplet<T, false, true>(params)) : f(Triplet<T, false, false>(params));
  }
};

// torch.nn.functional.multi_margin_loss: the mean over the columns c of max(0, margin - x_y + x_c)^p, that of the
// target y left out. A NaN adds nothing, as in torch.
template <class T, bool kSquared>
struct Hinges {
  static constexpr int operands = 1, sums = 2, coefficients = 1;
  static constexpr bool takes_class = true;
  T margin;

  explicit FUSEDLOSS_HD Hinges(const double* params) : margin(T(params[1])) {}

  FUSEDLOSS_HD T hinge(T x, const RowFacts<T>& row) const {
    const T z = margin - row.own + x;
    return select(z > T(0), z, T(0));
  }
  FUSEDLOSS_HD T slope(T x, const RowFacts<T>& row) const {
    if constexpr (kSquared) return T(2) * hinge(x, row);
    return select(margin - row.own + x > T(0), T(1), T(0));
  }
  FUSEDLOSS_HD void terms(const T (&x)[1], const RowFacts<T>& row, T (&terms)[2]) const {
    const T z = hinge(x[0], row);
    terms[0] = kSquared ? z * z : z;
    terms[1] = slope(x[0], row);
  }
  FUSEDLOSS_HD T value(const T (&sums)[2], const RowFacts<T>& row) const { return sums[0] * row.weight; }
  FUSEDLOSS_HD void gradient(const T (&)[2], const RowFacts<T>& row, T upstream, T (&c)[1]) const {
    c[0] = upstream * row.weight;
  }
  FUSEDLOSS_HD void gradients(const T (&x)[1], const RowFacts<T>& row, const T (&c)[1], T (&grads)[1]) const {
    grads[0] = c[0] * slope(x[0], row);
  }
  // In the column of the target.
  static FUSEDLOSS_HD T own_gradient(const T (&sums)[2], const T (&c)[1]) { return -c[0] * sums[1]; }
};

template <class T>
struct MultiMargin {
  static constexpr int operands = 1;
  static constexpr bool takes_class = true;
  static constexpr Range params[] = {{1, 2}, {-kInfinity}};  // p, margin
  static constexpr int whole = 0;
  template <class F>
  static auto with_form(const double* params, F f) {
    return params[0] == 2 ? f(Hinges<T, true>(params)) : f(Hinges<T, false>(params));
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA

#define FUSEDLOSS_ROW_SUMS(X)          \
  X(cosine_embedding, CosineEmbedding) \
  X(triplet_margin, TripletMargin)     \
  X(multi_margin, MultiMargin)
