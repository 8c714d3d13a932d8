// The divergence of two rows, student and teacher, which all distillation losses share on every device.
//
// A class has a probability q of the student's row and p of the teacher's, and both their logarithms. A direction is a
// functor. It gives
//
//     term(class)                what the class adds: to the row's value, and to the row's constant
//     gradient(class, constant)  d value / d z, where z is the student's logit over the temperature
//     in_one_pass                whether value and constant follow from sums that are collected beside those of both
//     rows needs_logarithms           whether the gradient of a class does, not q and p alone
//
// where -infinity - -infinity of two masked classes is no number, so each part asks first whether its factor is 0.
#pragma once

#include "functions.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T>
struct ClassOfPair {
  T q, p, log_q, log_p;
};

template <class T>
struct DivergenceTerm {
  T value, constant;
};

// What one pass over both rows collects: of each its max and the sum of exp(x - max), and `cross`, the direction's own
// sum of exponentials times differences. The max of a teacher that is given as probabilities is 0.
template <class T>
struct PairStatistics {
  T max_q, sum_q, max_p, sum_p, cross;
};

// A row whose sums are complete: log q = (z - max_q) - log_sum_q, and the same of p.
template <class T>
struct PairRow {
  T max_q, log_sum_q, max_p, log_sum_p, value, constant;
};

// weight * number, 0 where the weight is.
template <class T>
FUSEDLOSS_HD T weighed(T weight, T number) {
  return select(weight == T(0), T(0), weight * number);
}

// sum e^gap d, seen from a max that is higher by -rise: e^gap shrinks, and d grows by `moved`.
template <class T>
FUSEDLOSS_HD T moved_cross(T cross, T sum, T moved, T shrunk) {
  return select(shrunk == T(0), T(0), (cross + sum * moved) * shrunk);
}

// KL(teacher || student). The constant is the teacher's mass, 1 but for rounding and for what the caller gives.
template <class T>
struct ForwardDivergence {
  static constexpr bool in_one_pass = true, needs_logarithms = false;
  FUSEDLOSS_HD explicit ForwardDivergence(double = 0) {}

  FUSEDLOSS_HD T cross(T, T gap_q, T e_p, T gap_p) const { return weighed(e_p, gap_p - gap_q); }
  // The maxes rise; gaps are the old ones less the new ones.
  template <class U>
  static FUSEDLOSS_HD void raise(PairStatistics<U>& row, U gap_q, U, U gap_p, U shrunk_p) {
    row.cross = moved_cross(row.cross, row.sum_p, gap_p - gap_q, shrunk_p);
  }
  template <class U>
  static FUSEDLOSS_HD DivergenceTerm<U> complete(const PairStatistics<U>& row, U log_sum_q, U log_sum_p, U total_p) {
    return {(row.cross + row.sum_p * (log_sum_q - log_sum_p)) / total_p, row.sum_p / total_p};
  }
  FUSEDLOSS_HD DivergenceTerm<T> term(const ClassOfPair<T>& c) const { return {weighed(c.p, c.log_p - c.log_q), c.p}; }
  FUSEDLOSS_HD T gradient(const ClassOfPair<T>& c, T constant) const { return constant * c.q - c.p; }
};

// KL(student || teacher). The constant is the value.
template <class T>
struct ReverseDivergence {
  static constexpr bool in_one_pass = true, needs_logarithms = true;
  FUSEDLOSS_HD explicit ReverseDivergence(double = 0) {}

  FUSEDLOSS_HD T cross(T e_q, T gap_q, T, T gap_p) const { return weighed(e_q, gap_q - gap_p); }
  template <class U>
  static FUSEDLOSS_HD void raise(PairStatistics<U>& row, U gap_q, U shrunk_q, U gap_p, U) {
    row.cross = moved_cross(row.cross, row.sum_q, gap_q - gap_p, shrunk_q);
  }
  template <class U>
  static FUSEDLOSS_HD DivergenceTerm<U> complete(const PairStatistics<U>& row, U log_sum_q, U log_sum_p, U) {
    const U value = row.cross / row.sum_q + (log_sum_p - log_sum_q);
    return {value, value};
  }
  FUSEDLOSS_HD DivergenceTerm<T> term(const ClassOfPair<T>& c) const {
    const T value = weighed(c.q, c.log_q - c.log_p);
    return {value, value};
  }
  FUSEDLOSS_HD T gradient(const ClassOfPair<T>& c, T constant) const {
    return weighed(c.q, c.log_q - c.log_p - constant);
  }
};

// beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta p + (1 - beta) q. The constant is KL(student || m). It
// needs q and p themselves, so the sums of both rows come first.
template <class T>
struct JensenShannonDivergence {
  static constexpr bool in_one_pass = false, needs_logarithms = true;
  T of_teacher, of_student;
  FUSEDLOSS_HD explicit JensenShannonDivergence(double beta) : of_teacher(T(beta)), of_student(T(1 - beta)) {}

  FUSEDLOSS_HD T cross(T, T, T, T) const { return T(0); }
  template <class U>
  static FUSEDLOSS_HD void raise(PairStatistics<U>&, U, U, U, U) {}
  template <class U>
  static FUSEDLOSS_HD DivergenceTerm<U> complete(const PairStatistics<U>&, U, U, U) {
    return {U(0), U(0)};
  }

  struct Logs {
    T q_over_m, p_over_m;
  };
  // From the ratio of the smaller probability to the larger one, which is at most 1: the logarithm of larger / m keeps
  // its digits where both are close.
  FUSEDLOSS_HD Logs logs(const ClassOfPair<T>& c) const {
    const T difference = c.log_p - c.log_q;
    const bool q_is_larger = difference < T(0);
    const T share = select(q_is_larger, of_teacher, of_student);
    const T larger = -log1p(share * exp_and_expm1(-abs(difference)).minus_one);
    const T smaller = larger - abs(difference);
    return {select(q_is_larger, larger, smaller), select(q_is_larger, smaller, larger)};
  }
  FUSEDLOSS_HD DivergenceTerm<T> term(const ClassOfPair<T>& c) const {
    const Logs log = logs(c);
    const T q = select(of_student == T(0), T(0), c.q), p = select(of_teacher == T(0), T(0), c.p);
    const T constant = weighed(q, log.q_over_m);
    return {of_teacher * weighed(p, log.p_over_m) + of_student * constant, constant};
  }
  FUSEDLOSS_HD T gradient(const ClassOfPair<T>& c, T constant) const {
    const T q = select(of_student == T(0), T(0), c.q);
    return of_student * weighed(q, logs(c).q_over_m - constant);
  }
};

// The same statistics seen from higher maxes.
template <class Direction, class T>
FUSEDLOSS_HD PairStatistics<T> raised(PairStatistics<T> row, T max_q, T max_p) {
  const T gap_q = row.max_q - max_q, shrunk_q = exp(gap_q), gap_p = row.max_p - max_p, shrunk_p = exp(gap_p);
  Direction::raise(row, gap_q, shrunk_q, gap_p, shrunk_p);
  return {max_q, row.sum_q * shrunk_q, max_p, row.sum_p * shrunk_p, row.cross};
}

// The row of complete statistics. A `given` teacher's probabilities are not divided by their sum.
template <class Direction, class T>
FUSEDLOSS_HD PairRow<T> complete(const PairStatistics<T>& row, bool given) {
  const T log_sum_q = log(row.sum_q), log_sum_p = given ? T(0) : log(row.sum_p);
  const T total_p = given ? T(1) : row.sum_p;
  const DivergenceTerm<T> of_row = Direction::complete(row, log_sum_q, log_sum_p, total_p);
  return {row.max_q, log_sum_q, row.max_p, log_sum_p, of_row.value, of_row.constant};
}

// log p of a teacher given as probabilities, or as their logarithms. What is no probability is NaN.
template <class T>
FUSEDLOSS_HD T log_of_given(T given, bool is_log) {
  const T log_p = select(is_log, given, functions::log(given));
  return select(log_p > T(80), functions::not_a_number<T>(), log_p);
}

// A class of a complete row from z, the student's logit over the temperature, and w, the teacher's or log p.
template <class T>
FUSEDLOSS_HD ClassOfPair<T> class_of(const PairRow<T>& row, T z, T w) {
  const T log_q = (z - row.max_q) - row.log_sum_q, log_p = (w - row.max_p) - row.log_sum_p;
  return {exp(log_q), exp(log_p), log_q, log_p};
}

}  // namespace fusedloss::FUSEDLOSS_ISA
