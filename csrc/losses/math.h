// Scalar arithmetic shared by every loss: torch-free, for the host and the device.
//
// Everything is branch-free, so that a plain loop over a functor becomes vector code on the CPU. Each instruction set
// compiles this file into its own namespace; without that the linker would keep one copy of an inline function for all
// of them, possibly one the machine cannot run.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef FUSEDLOSS_ISA
#define FUSEDLOSS_ISA baseline
#endif

#ifdef __CUDACC__
#define FUSEDLOSS_HD __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_HD inline __attribute__((always_inline))
#endif

namespace fusedloss::FUSEDLOSS_ISA {

template <class To, class From>
FUSEDLOSS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// condition ? a : b without a branch: the compiler would otherwise move the work for a or b under one, and a loop with
// control flow is no vector code.
template <class T>
FUSEDLOSS_HD T select(bool condition, T a, T b) {
#ifdef __CUDA_ARCH__
  return condition ? a : b;
#else
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Int mask = -Int(condition);
  return bit_cast<T>((bit_cast<Int>(a) & mask) | (bit_cast<Int>(b) & ~mask));
#endif
}

// Storage types. Arithmetic is done in Accumulate<S>: float for everything but double.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

FUSEDLOSS_HD float load(float x) { return x; }
FUSEDLOSS_HD double load(double x) { return x; }
FUSEDLOSS_HD float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FUSEDLOSS_HD float load(fp16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Subnormals are a multiple of 2^-24, built without a float subnormal so that flush-to-zero does no harm.
  const float subnormal = bit_cast<float>(0x3f000000u | magnitude) - 0.5f;
  const uint32_t special = magnitude >= 0x7c00u;  // infinity and NaN
  const float normal = bit_cast<float>((magnitude << 13) + (112u << 23) + special * (112u << 23));
  const float value = select(magnitude < 0x0400u, subnormal, normal);
  return bit_cast<float>(bit_cast<uint32_t>(value) | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest even, as torch does.
template <class S>
FUSEDLOSS_HD S store(Accumulate<S> x) {
  return x;
}
// The upper 16 of the bits are those of the bfloat16.
FUSEDLOSS_HD uint32_t bits_of_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
}
template <>
FUSEDLOSS_HD bf16 store<bf16>(float x) {
#ifdef __CUDA_ARCH__
  bf16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
#else
  return {uint16_t(bits_of_bf16(x) >> 16)};
#endif
}
template <>
FUSEDLOSS_HD fp16 store<fp16>(float x) {
#ifdef __CUDA_ARCH__
  fp16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
#else
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // Adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded by the addition itself.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | ((bits >> 16) & 0x8000u))};
#endif
}

template <class T>
FUSEDLOSS_HD T abs(T x) {
#ifdef __CUDA_ARCH__
  return ::fabs(x);
#else
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return bit_cast<T>(bit_cast<Bits>(x) & ~Bits(0) >> 1);
#endif
}

// a where the sign bit of x is set, else b. On a CPU the mask is one shift.
template <class T>
FUSEDLOSS_HD T select_by_sign(T x, T a, T b) {
#ifdef __CUDA_ARCH__
  return x < 0 ? a : b;
#else
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Int mask = bit_cast<Int>(x) >> (8 * sizeof(T) - 1);
  return bit_cast<T>(bit_cast<Int>(b) ^ ((bit_cast<Int>(a) ^ bit_cast<Int>(b)) & mask));
#endif
}

// magnitude, whose sign bit is clear, with that of x.
template <class T>
FUSEDLOSS_HD T with_sign_of(T x, T magnitude) {
#ifdef __CUDA_ARCH__
  return ::copysign(magnitude, x);
#else
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return bit_cast<T>(bit_cast<Bits>(magnitude) | (bit_cast<Bits>(x) & ~(~Bits(0) >> 1)));
#endif
}

// a / b for b from 2^-100 to 2^100. On a GPU four instructions and no branch where an IEEE division takes ten, within
// two units in the last place.
template <class T>
FUSEDLOSS_HD T divide(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    const float quotient = a * inverse;
    return fmaf(fmaf(-b, quotient, a), inverse, quotient);
  }
#endif
  return a / b;
}

// From macros, not std::numeric_limits: its functions would be shared between the instruction sets.
template <class T>
FUSEDLOSS_HD T infinity() {
  return T(INFINITY);
}
template <class T>
FUSEDLOSS_HD T lowest() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return -FLT_MAX;
  } else {
    return -DBL_MAX;
  }
}

// The polynomials below are minimax fits: exp(r) = 1 + r + r^2 P(r) on |r| <= log(2)/2 and
// log(m) = 2s + 2s^3 P(s^2) with s = (m-1)/(m+1) on [sqrt(1/2), sqrt(2)], within 0.1 of a rounding step.
// tools/coefficients.py computes their coefficients and the long constants.

template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round_to_int = 12582912.0f;                         // 1.5 * 2^23
  static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;  // high * k is exact
  static constexpr float exp_lowest = -88.0f;                                // 0 here and below
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  static constexpr float smallest_normal = 1.17549435e-38f, lift = 16777216.0f;  // 2^24
  static constexpr float lift_exponent = 24;
  static FUSEDLOSS_HD float exp_polynomial(float r) {
    float p = 0.0013814613f;
    p = p * r + 0.00836871f;
    p = p * r + 0.04166839f;
    p = p * r + 0.16666521f;
    return p * r + 0.49999994f;
  }
  // atanh(s) = s + s^3 P(s^2) for |s| <= 1/3
  static FUSEDLOSS_HD float atanh_polynomial(float z) {
    float p = 0.1401223f;
    p = p * z + 0.13999571f;
    p = p * z + 0.2001085f;
    return p * z + 0.33333206f;
  }
  static FUSEDLOSS_HD float log_polynomial(float z) {
    float p = 0.14935865f;
    p = p * z + 0.19988771f;
    return p * z + 0.33333388f;
  }
};

template <>
struct Constants<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round_to_int = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_lowest = -709.0;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double smallest_normal = 2.2250738585072014e-308, lift = 18014398509481984.0;  // 2^54
  static constexpr double lift_exponent = 54;
  static FUSEDLOSS_HD double exp_polynomial(double r) {
    double p = 2.5000069565431402e-8;
    p = p * r + 2.763023395101817e-7;
    p = p * r + 2.7557586274666723e-6;
    p = p * r + 2.4801493136097612e-5;
    p = p * r + 0.00019841269506770898;
    p = p * r + 0.001388888894359778;
    p = p * r + 0.008333333333494336;
    p = p * r + 0.041666666666530267;
    p = p * r + 0.16666666666666413;
    return p * r + 0.5000000000000011;
  }
  static FUSEDLOSS_HD double atanh_polynomial(double z) {
    double p = 0.08233819738583505;
    p = p * z + 0.03497122333787324;
    p = p * z + 0.05486283625866356;
    p = p * z + 0.058579753166847;
    p = p * z + 0.06668402909786603;
    p = p * z + 0.07692225966116072;
    p = p * z + 0.09090911601458501;
    p = p * z + 0.11111111062735303;
    p = p * z + 0.14285714286255013;
    p = p * z + 0.1999999999999699;
    return p * z + 0.33333333333333337;
  }
  static FUSEDLOSS_HD double log_polynomial(double z) {
    double p = 0.07397974805341635;
    p = p * z + 0.07657025281120682;
    p = p * z + 0.0909178216283382;
    p = p * z + 0.11111099286597308;
    p = p * z + 0.14285714371193753;
    p = p * z + 0.1999999999970734;
    return p * z + 0.3333333333333367;
  }
};

#ifdef __CUDA_ARCH__
// 2^(x log2 e) by the special function unit, within two units in the last place; what the product loses is put back,
// so that the error does not grow with |x|.
FUSEDLOSS_HD float exp_by_exp2(float x) {
  constexpr float log2e = 1.44269504f, log2e_low = 1.92596303e-8f, ln2 = 0.69314718f;  // log2e + log2e_low = log2(e)
  float above, power_of_two;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(above) : "f"(x), "f"(Constants<float>::exp_lowest));
  const float product = above * log2e, lost = fmaf(above, log2e_low, fmaf(above, log2e, -product));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power_of_two) : "f"(product));
  return fmaf(power_of_two * lost, ln2, power_of_two);
}
#endif

// e^x = 2^k e^rest for x <= 0, with |rest| <= log(2)/2; 2^k is 0 where e^x would be subnormal.
template <class T>
struct Power {
  T of_two, rest;
};
template <class T>
FUSEDLOSS_HD Power<T> power_of_two(T x) {
  using C = Constants<T>;
  using Bits = std::make_unsigned_t<typename C::Int>;
  x = x < C::exp_lowest ? C::exp_lowest : x;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits: with the bias, the bits of an exponent.
  constexpr T shift = C::round_to_int + T(C::bias);
  const T shifted = x * T(1.44269504088896340736) + shift;
  const T k = shifted - shift;
  return {bit_cast<T>(bit_cast<Bits>(shifted) << C::mantissa), (x - k * C::ln2_high) - k * C::ln2_low};
}

// e^x for x <= 0, which is all a stable loss asks for: 0 where the result would be subnormal, NaN stays NaN.
template <class T>
FUSEDLOSS_HD T exp(T x) {
#ifdef __CUDA_ARCH__
  // Seven instructions where the polynomial takes fourteen: at 16 bytes of bfloat16 a vector, a forward pass has a
  // budget of some fifteen per logit before arithmetic rather than memory sets its speed.
  if constexpr (sizeof(T) == sizeof(float)) return exp_by_exp2(x);
#endif
  const auto [two_k, r] = power_of_two(x);
  return ((Constants<T>::exp_polynomial(r) * r + T(1)) * r + T(1)) * two_k;
}

// e^x and e^x - 1 for x <= 0, both to the last digits.
template <class T>
struct Exponential {
  T value, minus_one;
};
template <class T>
FUSEDLOSS_HD Exponential<T> exp_and_expm1(T x) {
  const auto [two_k, r] = power_of_two(x);
  const T above_one = (Constants<T>::exp_polynomial(r) * r) * r + r;
  return {two_k * above_one + two_k, two_k * above_one + (two_k - T(1))};
}

// x = m 2^exponent for x > 0, where m lies between the roots of 1/2 and of 2. For anything else it gives some numbers:
// unsigned ones may overflow, as they do for -0 and for negative numbers whose result is not selected.
template <class T>
struct Scientific {
  T m, exponent;
};
template <class T>
FUSEDLOSS_HD Scientific<T> scientific(T x) {
  using C = Constants<T>;
  using Int = typename C::Int;
  using Bits = std::make_unsigned_t<Int>;
  const bool subnormal = x < C::smallest_normal;
  const Bits bits = bit_cast<Bits>(select(subnormal, x * C::lift, x));
  const Int k = Int(bits - Bits(C::sqrt_half)) >> C::mantissa;
  return {bit_cast<T>(bits - (Bits(k) << C::mantissa)), T(k) - select(subnormal, C::lift_exponent, T(0))};
}

// Natural logarithm for x >= 0: -infinity at 0, NaN and infinity stay.
template <class T>
FUSEDLOSS_HD T log(T x) {
  using C = Constants<T>;
  const auto [m, exponent] = scientific(x);
  const T s = divide(m - T(1), m + T(1)), z = s * s;
  const T value = exponent * C::ln2_high + (T(2) * s + (T(2) * s * z * C::log_polynomial(z) + exponent * C::ln2_low));
  return select(x == T(0), -infinity<T>(), select(x < infinity<T>(), value, x));
}

// log(1 + u) for u > -1: the rounding of 1 + u is put back, so that tiny u keep all their digits.
template <class T>
FUSEDLOSS_HD T log1p(T u) {
  const T sum = T(1) + u;
  const T correction = divide(u - (sum - T(1)), sum);
  const bool finite = bool(int(u < infinity<T>()) & int(sum > T(0)));
  return log(sum) + select(finite, correction, T(0));
}

// log(v) for v = 1 - rest in [0, 1], for numbers of a half type: its relative error is below 2^-17, also where v is
// close to 1. On a GPU ten instructions where log takes thirty.
template <class T>
FUSEDLOSS_HD T log_for_halves(T v, T rest) {
  const T near_one = -rest * (T(1) + rest * (T(1) / 2 + rest * (T(1) / 3 + rest * (T(1) / 4))));
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr float ln2 = 0.69314718f;
    float log2;
    asm("lg2.approx.f32 %0, %1;" : "=f"(log2) : "f"(v));
    return rest < T(0.0625) ? near_one : log2 * ln2;
  }
#endif
  return select(rest < T(0.0625), near_one, log(v));
}

// log(1 + u) for u >= -1 in sums over numbers of a half type: its relative error is below 2^-20. On a GPU ten
// instructions where log1p takes 45.
template <class T>
FUSEDLOSS_HD T log1p_for_halves(T u) {
  const T w = -u;
  T p = 0.1254603f;
  p = p * w + 0.23597744f;
  p = p * w + 0.3322337f;
  const T near_one = u - u * u * (p * w + 0.49997255f);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr float ln2 = 0.69314718f;
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(T(1) + u));
    return abs(u) < T(0.25) ? near_one : log2 * ln2;
  }
#endif
  return select(abs(u) < T(0.25), near_one, log(T(1) + u));
}

// x^y for x in [0, 1] and y >= 0, with 0^0 = 1: the log is kept finite so that y = 0 gives 1.
template <class T>
FUSEDLOSS_HD T power(T x, T y) {
  const T logarithm = log(x);
  return exp(y * (logarithm < lowest<T>() ? lowest<T>() : logarithm));
}

// The sigmoid p of x, q = 1 - p and softplus(-|x|) = log(1 + e^-|x|), from one exp and one division.
template <class T>
struct Sigmoid {
  T p, q, softplus;
};

template <class T>
FUSEDLOSS_HD Sigmoid<T> sigmoid(T x) {
  const T u = exp(-abs(x)), one_u = T(1) + u, two_u = T(2) + u, inverse = divide(T(1), one_u * two_u);
  const T larger = two_u * inverse, smaller = u * larger;
  const T s = u * one_u * inverse, z = s * s;  // log(1 + u) = 2 atanh(u / (2 + u))
  // Both are a half where x is a zero, of either sign.
  return {select_by_sign(x, smaller, larger), select_by_sign(x, larger, smaller),
          T(2) * s + T(2) * s * z * Constants<T>::atanh_polynomial(z)};
}

}  // namespace fusedloss::FUSEDLOSS_ISA
