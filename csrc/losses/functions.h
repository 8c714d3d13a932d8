// The functions that a loss written as an expression calls: for any argument, within a few rounding steps.
//
// NaN stays NaN, what is not real is NaN, and what is too large is infinite. Branch-free like math.h; sin, cos and atan
// alone are the C library's, and a loop that calls one is no vector code.
#pragma once

#include "math.h"

// In a namespace of their own, because exp of math.h is for x <= 0 and sigmoid has three results. The loss stands in it
// too, so that what it calls is found here first.
namespace fusedloss::FUSEDLOSS_ISA::functions {

using FUSEDLOSS_ISA::abs;
using FUSEDLOSS_ISA::select;

template <class T>
FUSEDLOSS_HD T not_a_number() {
  return T(NAN);
}

template <class T>
FUSEDLOSS_HD T square(T x) {
  return x * x;
}

template <int exponent, class T>
FUSEDLOSS_HD T integer_power(T x) {
  if constexpr (exponent < 0) {
    return T(1) / integer_power<-exponent>(x);
  } else if constexpr (exponent == 0) {
    return T(1);
  } else if constexpr (exponent % 2 == 1) {
    return integer_power<exponent - 1>(x) * x;
  } else {
    return square(integer_power<exponent / 2>(x));
  }
}

// As torch.sign: NaN gives 0.
template <class T>
FUSEDLOSS_HD T sign(T x) {
  return select(x > T(0), T(1), select(x < T(0), T(-1), T(0)));
}

template <class T>
FUSEDLOSS_HD T min(T a, T b) {
  return select(bool(int(a < b) | int(a != a)), a, b);
}
template <class T>
FUSEDLOSS_HD T max(T a, T b) {
  return select(bool(int(a > b) | int(a != a)), a, b);
}
template <class T>
FUSEDLOSS_HD T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

template <class T>
FUSEDLOSS_HD T sqrt(T x) {
#ifdef __CUDA_ARCH__
  return ::sqrt(x);
#else
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
#endif
}

template <class T>
FUSEDLOSS_HD T sin(T x) {
  return ::sin(x);
}
template <class T>
FUSEDLOSS_HD T cos(T x) {
  return ::cos(x);
}
template <class T>
FUSEDLOSS_HD T atan(T x) {
  return ::atan(x);
}

template <class T>
FUSEDLOSS_HD T log(T x) {
  return select(x < T(0), not_a_number<T>(), FUSEDLOSS_ISA::log(x));
}
template <class T>
FUSEDLOSS_HD T log1p(T x) {
  return select(x < T(-1), not_a_number<T>(), FUSEDLOSS_ISA::log1p(x));
}

// e^x = (1 + above_one) first second: by two powers of two, since one of them alone would overflow before e^x does.
template <class T>
struct Reduced {
  T above_one, first, second, one_over_second;
};

// For e^(x - correction), where correction is about as large as a rounding step of x.
template <class T>
FUSEDLOSS_HD Reduced<T> reduce(T x, T correction = T(0)) {
  using C = Constants<T>;
  using Bits = std::make_unsigned_t<typename C::Int>;
  constexpr T lowest = sizeof(T) == sizeof(float) ? -104 : -746, highest = sizeof(T) == sizeof(float) ? 90 : 711;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const T shifted = x * T(1.44269504088896340736) + C::round_to_int;
  const T n = shifted - C::round_to_int;
  const T r = ((x - n * C::ln2_high) - n * C::ln2_low) - correction;
  // Exponent bits: k plus twice the bias, which stays positive, is shared out evenly.
  const Bits both = bit_cast<Bits>(shifted) - bit_cast<Bits>(C::round_to_int) + Bits(2 * C::bias);
  const Bits first = both >> 1, second = both - first;
  return {(C::exp_polynomial(r) * r) * r + r, bit_cast<T>(first << C::mantissa), bit_cast<T>(second << C::mantissa),
          bit_cast<T>((Bits(2 * C::bias) - second) << C::mantissa)};
}

template <class T>
FUSEDLOSS_HD T exp_of(const Reduced<T>& e) {
  return (e.first * e.above_one + e.first) * e.second;
}
template <class T>
FUSEDLOSS_HD T half_exp_of(const Reduced<T>& e) {
  return (e.first * e.above_one + e.first) * (T(0.5) * e.second);
}
template <class T>
FUSEDLOSS_HD T half_expm1_of(const Reduced<T>& e) {
  return (e.first * e.above_one + (e.first - e.one_over_second)) * (T(0.5) * e.second);
}

template <class T>
FUSEDLOSS_HD T exp(T x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  return exp_of(reduce(x));
#endif
}
template <class T>
FUSEDLOSS_HD T expm1(T x) {
#ifdef __CUDA_ARCH__
  return ::expm1(x);
#else
  return T(2) * half_expm1_of(reduce(x));
#endif
}

template <class T>
FUSEDLOSS_HD T sinh(T x) {
  const T half = half_expm1_of(reduce(abs(x)));  // (e^|x| - 1) / 2
  return with_sign_of(x, select(half < infinity<T>(), half + half / (T(2) * half + T(1)), half));
}
template <class T>
FUSEDLOSS_HD T cosh(T x) {
  const T half = half_exp_of(reduce(abs(x)));
  return half + T(0.25) / half;
}

// tanh(x) and log(cosh(x)), the slope and the value of a loss, from one division.
template <class T>
struct Hyperbolic {
  T tanh, log_cosh;
};

// With e = e^-2|x|, tanh|x| = (1 - e) / (1 + e), and log(cosh(x)) is either atanh(tanh^2 / (2 - tanh^2)), which keeps
// the digits of a small x, or |x| - log(2) + 2 atanh(e / (2 + e)).
FUSEDLOSS_HD Hyperbolic<double> hyperbolic(double x) {
  const double distance = abs(x);
  const Exponential<double> e = exp_and_expm1(-2 * distance);
  const bool small = distance < 0.875;
  const double sum = 2 + e.minus_one, square_of_difference = e.minus_one * e.minus_one;
  const double over = select(small, square_of_difference, e.value);
  const double under = select(small, 2 * sum * sum - square_of_difference, 2 + e.value);
  const double inverse = 1 / (under * sum);
  const double s = over * sum * inverse, z = s * s, atanh = s + s * z * Constants<double>::atanh_polynomial(z);
  const double tanh = abs(e.minus_one) * under * inverse;
  const double log_cosh = select(small, atanh, (distance - 0.69314718055994530942) + 2 * atanh);
  return {with_sign_of(x, tanh), log_cosh};
}

// a[0] + a[1] z + ... + a[7] z^7, in pairs: fewer roundings at full size than Horner's seven.
FUSEDLOSS_HD float polynomial(const float (&a)[8], float z, float z2) {
  return (a[0] + a[1] * z) + z2 * ((a[2] + a[3] * z) + z2 * ((a[4] + a[5] * z) + z2 * (a[6] + a[7] * z)));
}

// In float without an exp: tanh(x) / x and log(cosh(x)) / x^2 as rational functions of x^2 over one denominator,
// within 6e-8 of either for |x| <= 8; above, tanh is taken for 1, four units off at first, and log(cosh(x)) for
// |x| - log(2). Value and slope take 0.26 ns an element of a core with AVX-512, by the formulas above 0.59.
FUSEDLOSS_HD Hyperbolic<float> hyperbolic(float x) {
  // From tools/coefficients.py.
  constexpr float of_tanh[] = {1.0f,           0.5891062f,   0.11590997f,  0.0097758835f,
                               0.00039635724f, 9.587754e-6f, 8.755576e-8f, 9.279984e-11f};
  constexpr float of_log_cosh[] = {0.5f,           0.3778859f,   0.09038293f,  0.008296139f,
                                   0.00035073375f, 8.824539e-6f, 8.465896e-8f, 9.260611e-11f};
  constexpr float under[] = {1.0f,          0.9224391f,    0.2900579f,    0.037436265f,
                             0.0021150121f, 6.6304085e-5f, 1.0932961e-6f, 4.2507575e-9f};
  const float distance = abs(x), z = distance * distance, z2 = z * z, inverse = 1 / polynomial(under, z, z2);
  const float tanh = distance * (polynomial(of_tanh, z, z2) * inverse);
  const float log_cosh = z * (polynomial(of_log_cosh, z, z2) * inverse);
  const bool far = distance > 8;
  return {with_sign_of(x, select(bool(int(far) | int(tanh > 1)), 1.0f, tanh)),
          select(far, distance - 0.69314718f, log_cosh)};
}

template <class T>
FUSEDLOSS_HD T tanh(T x) {
  return hyperbolic(x).tanh;
}
template <class T>
FUSEDLOSS_HD T log_cosh(T x) {
  return hyperbolic(x).log_cosh;
}

// Called with the same x, all four share one exp and one division; with -x they would not.
template <class T>
FUSEDLOSS_HD T sigmoid(T x) {
  return FUSEDLOSS_ISA::sigmoid(x).p;
}
template <class T>
FUSEDLOSS_HD T sigmoid_of_minus(T x) {
  return FUSEDLOSS_ISA::sigmoid(x).q;
}
template <class T>
FUSEDLOSS_HD T softplus(T x) {
  return select(x < T(0), T(0), x) + FUSEDLOSS_ISA::sigmoid(x).softplus;
}
template <class T>
FUSEDLOSS_HD T softplus_of_minus(T x) {
  return select(x > T(0), T(0), -x) + FUSEDLOSS_ISA::sigmoid(x).softplus;
}

// log(m) = 2s + 2s^3 P(s^2), minimax with digits to spare: pow multiplies the error of the log.
template <class T>
FUSEDLOSS_HD T precise_log_polynomial(T z) {
  // From tools/coefficients.py.
  if constexpr (sizeof(T) == sizeof(float)) {
    T p = 0.11666134f;
    p = p * z + 0.1427537f;
    p = p * z + 0.20000061f;
    return p * z + 0.33333334f;
  } else {
    T p = 0.05941546121920451;
    p = p * z + 0.058439973653919224;
    p = p * z + 0.06667822417439823;
    p = p * z + 0.07692287489406602;
    p = p * z + 0.09090909297887186;
    p = p * z + 0.11111111109921437;
    p = p * z + 0.1428571428571771;
    p = p * z + 0.19999999999999996;
    return p * z + 0.3333333333333333;
  }
}

// The upper half of the digits: products of two such are exact.
template <class T>
FUSEDLOSS_HD T upper_half(T x) {
  using Bits = std::make_unsigned_t<typename Constants<T>::Int>;
  return bit_cast<T>(bit_cast<Bits>(x) & (~Bits(0) << (sizeof(T) == sizeof(float) ? 12 : 27)));
}

// a^b of a finite a > 0 as e^(b log a), with log a to half as many digits again.
template <class T>
FUSEDLOSS_HD T power_of_positive(T a, T b) {
  using C = Constants<T>;
  const auto [m, exponent] = scientific(a);

  // s = (m - 1) / (m + 1) in two parts; what rounding m + 1 loses is m - (sum - 1).
  const T sum = m + T(1), difference = m - T(1), inverse = T(1) / sum, s = difference * inverse;
  const T s_upper = upper_half(s), sum_upper = upper_half(sum);
  const T remainder = (difference - s_upper * sum_upper) - s_upper * (sum - sum_upper) - s_upper * (m - (sum - T(1)));
  const T s_lower = remainder * inverse, z = s * s;

  // The log in two parts, of which the first times the upper half of b is exact.
  const T whole = exponent * C::ln2_high, high = whole + T(2) * s_upper;
  const T low = ((whole - high) + T(2) * s_upper) +
                (T(2) * s_lower + (T(2) * s * z * precise_log_polynomial(z) + exponent * C::ln2_low));
  const T log_upper = upper_half(high + low), log_lower = (high - log_upper) + low;
  const T b_upper = upper_half(b), product = clamp(b_upper * log_upper, T(-1000), T(1000));
  const T correction = b * log_lower + (b - b_upper) * log_upper;
  // Where e^product is 0 or infinite the correction may be infinite minus infinite.
  const T kept = select(abs(product) < T(1000), correction, T(0)), x = product + kept;
  return exp_of(reduce(x, (x - product) - kept));
}

// As torch.pow, for an integer b also of a negative a; beyond 2^(mantissa - 1) every b counts as even.
template <class T>
FUSEDLOSS_HD T pow(T a, T b) {
  using C = Constants<T>;
  // Rounded by adding 1.5 * 2^mantissa; comparing the halves, where a bit of it would be no vector code.
  const T distance = abs(a), rounded = (b + C::round_to_int) - C::round_to_int, half = T(0.5) * rounded;
  const bool large = abs(b) >= T(typename C::Int(1) << (C::mantissa - 1));
  const bool integer = bool(int(rounded == b) | int(large));
  const bool odd = bool(int((half + C::round_to_int) - C::round_to_int != half) & int(!large));
  T value = power_of_positive(distance, b);
  value = select(distance == T(0), select(b > T(0), T(0), infinity<T>()), value);
  value = select(distance == infinity<T>(), select(b > T(0), infinity<T>(), T(0)), value);
  value = select(distance == T(1), T(1), value);
  const bool real = bool(int(integer) | int(distance == T(0)) | int(distance == infinity<T>()));
  value = select_by_sign(a, select(real, select(odd, -value, value), not_a_number<T>()), value);
  value = select(bool(int(a == a) & int(b == b)), value, not_a_number<T>());
  return select(bool(int(b == T(0)) | int(a == T(1))), T(1), value);
}

}  // namespace fusedloss::FUSEDLOSS_ISA::functions
