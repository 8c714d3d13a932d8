// How a softmax reads its logits: as they are, divided by a temperature, or capped. A functor turns a logit x into z
// and dz / dx; a mask, x = -infinity, stays one.
#pragma once

#include "math.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T>
struct ZAndSlope {
  T z, slope;
};

template <class T>
struct Unchanged {
  static constexpr bool changes = false;
  FUSEDLOSS_HD explicit Unchanged(double = 0) {}
  FUSEDLOSS_HD ZAndSlope<T> operator()(T x) const { return {x, T(1)}; }
};

template <class T>
struct Scaled {
  static constexpr bool changes = true;
  T scale;
  FUSEDLOSS_HD explicit Scaled(double temperature) : scale(T(1 / temperature)) {}
  FUSEDLOSS_HD ZAndSlope<T> operator()(T x) const { return {x * scale, scale}; }
};

// cap * tanh(x / cap), from e = exp(-2 |x| / cap): tanh = (1 - e) / (1 + e), 1 - tanh^2 = 4 e / (1 + e)^2.
template <class T>
struct Softcap {
  static constexpr bool changes = true;
  T cap, inverse;
  FUSEDLOSS_HD explicit Softcap(double given) : cap(T(given)), inverse(T(1 / given)) {}
  FUSEDLOSS_HD ZAndSlope<T> operator()(T x) const {
    const Exponential<T> e = exp_and_expm1(T(-2) * abs(x) * inverse);
    const T one_over = T(1) / (T(2) + e.minus_one), capped = cap * -e.minus_one * one_over;
    const T z = select(x < T(0), -capped, capped);
    return {select(x == -infinity<T>(), x, z), T(4) * e.value * one_over * one_over};
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
