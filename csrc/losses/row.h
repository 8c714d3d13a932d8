// The arithmetic of a row of logits, which all softmax losses share on every device.
//
// A row is known by its statistics: a few sums over its columns, collected in one pass, in any order and in parts. They
// leave out the target's column y. So a confident row keeps its digits: the probability of being wrong, q = 1 - p, is a
// sum of small numbers and never 1 minus a number near 1. `complete` adds the target's column at the end. A loss turns
// the complete row into its value and into the coefficients of its gradient, which for every loss is
//
//     d value / d z_c = p_c (a + b + h (z_c - max)) - b [c == y] - s k_c
//
// where z = logit(x) is what the softmax p is taken of, and k_c = factor(weight, probability) belongs to the column.
// Most losses need a and b alone, and sum nothing but exponentials. What a loss sums beside them is a policy, and its
// functor names one: SumNone, SumLinear or SumEntropy.
#pragma once

#include "logit.h"

namespace fusedloss::FUSEDLOSS_ISA {

// All over the columns j != y: the max of z_j, the sum of exp(z_j - max), the policy's sum, and mass, the sum of k_j.
template <class T>
struct RowStatistics {
  T max, sum_without_target, sum, mass;
};

// A column as the sums and the gradient see it: gap = z_c - max, e = exp(gap), factor = k_c.
template <class T>
struct Column {
  T e, gap, factor;
};

// A term of SumLinear; a class of factor 0 adds nothing, even where it is masked by -infinity, and the highest class
// adds nothing, even with a factor of infinity.
template <class T>
FUSEDLOSS_HD T linear_term(T factor, T below_max) {
  return select((factor == T(0)) | (below_max == T(0)), T(0), factor * below_max);
}

// A term of SumEntropy: 0 where the exponential is.
template <class T>
FUSEDLOSS_HD T entropy_term(T e, T gap) {
  return e * (gap < Constants<T>::exp_lowest ? Constants<T>::exp_lowest : gap);
}

// A policy says what a row sums beside its exponentials, and all that follows from it:
//
//     has_sum      whether there is a sum at all
//     has_factors  whether it is a sum over k_c: then k_c is read for every column, and the row has a mass
//     has_entropy  whether it is a sum over e and gap: then the gradient of a column needs its gap, not e alone
//     even         whether k_c is 1 in every class, whatever its weight
//     saved        how many numbers of a row forward saves for backward
//     third        the third of them, after max and sum_without_target; a fourth one is the mass
//     add          adds a column to the sum
//     raise        moves the sum to a higher max: gap is the old max less the new one, shrunk = exp(gap)
//     gradient     adds the sum's part to the gradient of a column; value is the rest of it, h and s its coefficients

// Nothing.
struct SumNone {
  static constexpr bool has_sum = false, has_factors = false, has_entropy = false, even = false;
  static constexpr int saved = 2;

  template <class T>
  static FUSEDLOSS_HD void add(T&, const Column<T>&) {}
  template <class T>
  static FUSEDLOSS_HD void raise(RowStatistics<T>&, T, T) {}
  template <class T>
  static FUSEDLOSS_HD T third(const RowStatistics<T>&) {
    return T(0);
  }
  template <class T>
  static FUSEDLOSS_HD T gradient(T value, T, T, const Column<T>&) {
    return value;
  }
};

// The sum of k_c (max - z_c). Backward needs only the mass.
struct SumLinear {
  static constexpr bool has_sum = true, has_factors = true, has_entropy = false, even = false;
  static constexpr int saved = 3;

  template <class T>
  static FUSEDLOSS_HD void add(T& sum, const Column<T>& column) {
    sum += linear_term(column.factor, -column.gap);
  }
  template <class T>
  static FUSEDLOSS_HD void raise(RowStatistics<T>& row, T gap, T) {
    row.sum -= linear_term(row.mass, gap);
  }
  template <class T>
  static FUSEDLOSS_HD T third(const RowStatistics<T>& row) {
    return row.mass;
  }
  template <class T>
  static FUSEDLOSS_HD T gradient(T value, T, T s, const Column<T>& column) {
    return value - s * column.factor;
  }
};

// The sum of max - z_c, with all k_c 1. Backward needs it too.
struct SumEven : SumLinear {
  static constexpr bool even = true;
  static constexpr int saved = 4;

  template <class T>
  static FUSEDLOSS_HD T third(const RowStatistics<T>& row) {
    return row.sum;
  }
};

// The sum of e^(z_c - max) (z_c - max).
struct SumEntropy {
  static constexpr bool has_sum = true, has_factors = false, has_entropy = true, even = false;
  static constexpr int saved = 3;

  template <class T>
  static FUSEDLOSS_HD void add(T& sum, const Column<T>& column) {
    sum += entropy_term(column.e, column.gap);
  }
  template <class T>
  static FUSEDLOSS_HD void raise(RowStatistics<T>& row, T gap, T shrunk) {
    row.sum = select(row.sum_without_target == T(0), T(0), (row.sum + row.sum_without_target * gap) * shrunk);
  }
  template <class T>
  static FUSEDLOSS_HD T third(const RowStatistics<T>& row) {
    return row.sum;
  }
  template <class T>
  static FUSEDLOSS_HD T gradient(T value, T h, T, const Column<T>& column) {
    return value + h * entropy_term(column.e, column.gap);
  }
};

// The same statistics seen from a higher max.
template <class Sum, class T>
FUSEDLOSS_HD RowStatistics<T> raised(RowStatistics<T> row, T max) {
  const T gap = row.max - max, shrunk = exp(gap);
  Sum::raise(row, gap, shrunk);
  return {max, row.sum_without_target * shrunk, row.sum, row.mass};
}

// The statistics of a row from what forward saved, [Sum::saved, rows].
template <class Sum, class T>
FUSEDLOSS_HD RowStatistics<T> read_saved(const T* saved, int64_t rows, int64_t row) {
  const T third = Sum::saved >= 3 ? saved[2 * rows + row] : T(0);
  return {saved[row], saved[rows + row], third, Sum::saved == 4 ? saved[3 * rows + row] : third};
}

// k_y, which the statistics leave out; class probabilities leave out nothing.
template <class Loss, class T>
FUSEDLOSS_HD T factor_of_target(T weight) {
  if (!Loss::Sum::has_factors || Loss::soft) return T(0);
  return Loss::Sum::even ? T(1) : weight;
}

// The row as a functor sees it: ce = -log p, p the probability of the target, q = 1 - p, p_c = exp(z_c - max) *
// inverse, log_total = lse - max, and sum and mass over all columns. Without a target (logit -infinity) p = 0 and q
// = 1.
template <class T>
struct Row {
  T ce, p, q, max, inverse, log_total, sum, mass;
  FUSEDLOSS_HD T lse() const { return max + log_total; }
};

// Adds the target's column to the statistics; logit is its z, weight that of its class.
template <class Loss, class T>
FUSEDLOSS_HD Row<T> complete(RowStatistics<T> statistics, T logit, T weight) {
  using Sum = typename Loss::Sum;
  const bool target_is_max = logit >= statistics.max;
  const T max = select(target_is_max, logit, statistics.max), factor = factor_of_target<Loss>(weight);
  statistics = raised<Sum>(statistics, max);
  // A lone +infinity makes inf - inf = NaN here, as in torch.
  const T sum_without_target = statistics.sum_without_target, own = exp(logit - max);
  const T inverse = divide(T(1), sum_without_target + own);  // of a sum from 1 to C
  // total - 1, formed without ever adding and taking away the 1.
  const T log_total = log1p(select(target_is_max, sum_without_target, (sum_without_target - T(1)) + own));
  T sum = statistics.sum;
  Sum::add(sum, Column<T>{own, logit - max, factor});
  return {(max - logit) + log_total, own * inverse, sum_without_target * inverse, max, inverse, log_total, sum,
          statistics.mass + factor};
}

// What a loss says of its gradient, in the formula at the top.
template <class T>
struct Coefficients {
  T a, b, s, h;
};

// The same for the columns: what e, its entropy_term and k_c are multiplied by.
template <class T>
struct ColumnCoefficients {
  T exponential, entropy, factor;
};

// The gradient by z_c of a column that is not the target's.
template <class Sum, class T>
FUSEDLOSS_HD T column_gradient(const ColumnCoefficients<T>& coefficients, const Column<T>& column) {
  return Sum::gradient(coefficients.exponential * column.e, coefficients.entropy, coefficients.factor, column);
}

// What the gradient of all columns is made from, and `own`, the gradient by the target's logit x.
template <class T>
struct GradientOfRow {
  ColumnCoefficients<T> columns;
  T own;
};

template <class Loss, class T>
FUSEDLOSS_HD GradientOfRow<T> gradient_of_row(const Loss& loss, const Row<T>& row, const ZAndSlope<T>& target, T weight,
                                              T upstream, T upstream_second) {
  const Coefficients<T> c = loss.gradient(row, weight, upstream, upstream_second);
  const Column<T> column = {row.p, target.z - row.max, factor_of_target<Loss>(weight)};
  // p_y - 1 is -q, so that nothing cancels.
  const T own = Loss::Sum::gradient(c.a * row.p - c.b * row.q, c.h, c.s, column);
  return {{(c.a + c.b) * row.inverse, c.h * row.inverse, c.s}, own * target.slope};
}

// What a row that counts adds to the divisor of a mean.
template <class Loss, class T>
FUSEDLOSS_HD T weight_in_mean(T weight) {
  return Loss::mean_by_weight ? weight : T(1);
}

// What the sum of losses is divided by. Divided by infinity, a mean over nothing and its gradient are 0.
FUSEDLOSS_HD double reduction_divisor(bool mean, bool zero_for_none, double weight) {
  if (!mean) return 1;
  return zero_for_none && weight == 0 ? infinity<double>() : weight;
}

}  // namespace fusedloss::FUSEDLOSS_ISA
