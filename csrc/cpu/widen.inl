// Numbers of any dtype and stride as dense ones of the arithmetic type, and back.
#pragma once

#include "../kernels/functors.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T, class S>
void widen(const S* from, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = T(load(from[i]));
}

template <class T, class S>
void narrow(const T* from, int64_t count, S* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = store<S>(Accumulate<S>(from[i]));
}

#if defined(FUSEDLOSS_F16C)
// One instruction for eight numbers, where load and store take ten.
inline void widen_eight(const fp16* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow_eight(const float* from, fp16* to) {
  const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}

inline void widen(const fp16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) widen_eight(from + i, to + i);
  if (i == count) return;
  fp16 rest[8] = {};
  float widened[8];
  std::memcpy(rest, from + i, (count - i) * sizeof(fp16));
  widen_eight(rest, widened);
  std::memcpy(to + i, widened, (count - i) * sizeof(float));
}

inline void narrow(const float* from, int64_t count, fp16* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) narrow_eight(from + i, to + i);
  if (i == count) return;
  float rest[8] = {};
  fp16 narrowed[8];
  std::memcpy(rest, from + i, (count - i) * sizeof(float));
  narrow_eight(rest, narrowed);
  std::memcpy(to + i, narrowed, (count - i) * sizeof(fp16));
}
#endif

template <class T, class S>
void widen(const S* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    widen(from, count, to);
  } else if (stride == 0) {
    const T value = T(load(*from));
    for (int64_t i = 0; i < count; ++i) to[i] = value;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = T(load(from[i * stride]));
  }
}

}  // namespace fusedloss::FUSEDLOSS_ISA
