// A user's own loss of rows: an expression of what a row is known by. Class weights multiply the expression, or stand
// in it, and label smoothing is a part of its cross-entropy.
#pragma once

#include "functions.h"
#include "softmax.h"

namespace fusedloss::FUSEDLOSS_ISA {

// What an expression names. nll is -log p of the target, and ce the same with label smoothing e over C classes:
// (1 - e) nll + e / C * sum_c (lse - z_c).
template <class T>
struct AtRow {
  T ce, nll, p, q, lse, weight;
};

// An expression has a value; its slope by ce where that is nll, which is the slope by nll, p and q too; the slopes by
// ce alone and by nll, p and q alone; and the slope by lse.
template <class T, class Expression, bool kSmooth>
struct ExpressionOfRow : OfRow<T> {
  using Sum = std::conditional_t<kSmooth, SumEven, SumNone>;
  static constexpr bool second_of_ignored = false, takes_power = true;
  Unchanged<T> logit;
  Expression expression;
  T kept, uniform;

  FUSEDLOSS_HD ExpressionOfRow(const double* params, int64_t classes)
      : expression(params + 1), kept(T(1 - params[0])), uniform(T(params[0] / double(classes))) {}

  // At a q of 0, where the other classes underflow, a power of q could have an infinite slope.
  FUSEDLOSS_HD AtRow<T> at(const Row<T>& row, T weight) const {
    constexpr T least = Constants<T>::smallest_normal;
    const T smooth = kSmooth ? linear_term(uniform, row.mass * row.log_total + row.sum) : T(0);
    const T ce = kSmooth ? kept * row.ce + smooth : row.ce;
    return {ce, row.ce, row.p, row.q < least ? least : row.q, row.lse(), weight};
  }
  FUSEDLOSS_HD T factor(T, T) const { return T(1); }
  FUSEDLOSS_HD T value(const Row<T>& row, T weight) const { return expression.value(at(row, weight)); }
  FUSEDLOSS_HD Coefficients<T> gradient(const Row<T>& row, T weight, T upstream, T upstream_second) const {
    const AtRow<T> here = at(row, weight);
    const T of_lse = upstream * expression.by_lse(here) + upstream_second;
    if constexpr (kSmooth) {
      const T of_ce = upstream * expression.by_ce_alone(here), s = of_ce * uniform;
      return {of_lse + s * row.mass, kept * of_ce + upstream * expression.by_nll_alone(here), s, T(0)};
    } else {
      return {of_lse, upstream * expression.by_ce(here), T(0), T(0)};
    }
  }
};

// The loss of an expression, whose first parameter is the label smoothing: that of one without ce is 0.
template <class T, class Expression, bool kNamesCe = Expression::names_ce>
struct CustomRow : ExpressionOfRow<T, Expression, false> {
  static constexpr Range params[] = {{0, 0}};
  FUSEDLOSS_HD CustomRow(const double* params, int64_t classes)
      : ExpressionOfRow<T, Expression, false>(params, classes) {}
};

template <class T, class Expression>
struct CustomRow<T, Expression, true> : ExpressionOfRow<T, Expression, true> {
  using Specialised = ExpressionOfRow<T, Expression, false>;
  static bool applies(const double* params) { return params[0] == 0; }
  static constexpr Range params[] = {{0, 1}};
  FUSEDLOSS_HD CustomRow(const double* params, int64_t classes)
      : ExpressionOfRow<T, Expression, true>(params, classes) {}
};

}  // namespace fusedloss::FUSEDLOSS_ISA
