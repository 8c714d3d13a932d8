// Stores past the caches, for a gradient too large to stay there. Down the columns of an image a plain store reads each
// line before it writes it, and pushes out others at the same distance of a power of two: (4, 21, 256, 256) float32
// backward takes 1.8 ms, this way 1.3. Along rows the processor does as well by itself.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fusedloss::FUSEDLOSS_ISA {

// Whole lines only; half of one would be read and written by itself.
template <class S>
void stream(S* to, const S* from, int64_t count) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64 / sizeof(S), kVector = 16 / sizeof(S);
  const int64_t head = least(count, int64_t(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(S)));
  const int64_t body = head + (count - head) / kLine * kLine;
  if (head) std::memcpy(to, from, head * sizeof(S));
  for (int64_t i = head; i < body; i += kVector) {
    __m128i vector;
    std::memcpy(&vector, from + i, sizeof(vector));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), vector);
  }
  if (body < count) std::memcpy(to + body, from + body, (count - body) * sizeof(S));
#else
  std::memcpy(to, from, count * sizeof(S));
#endif
}

// Before another thread may read what was streamed.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace fusedloss::FUSEDLOSS_ISA
