// Arithmetic by lanes, and vectors of four where the compiler would not find the shuffles by itself.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

// Independent sums, so that additions neither wait for each other nor depend on the vector width.
constexpr int kLanes = 32;

template <class T>
using Quad __attribute__((vector_size(4 * sizeof(T)))) = T;

#if __has_builtin(__builtin_shufflevector)
#define FUSEDLOSS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FUSEDLOSS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Quad<typename Constants<T>::Int>{__VA_ARGS__})
#endif

// Merges all lanes into one by f(one, another), in a fixed order.
template <class T, class F>
FUSEDLOSS_HD T merge_lanes(const T (&lanes)[kLanes], F f) {
  Quad<T> quads[kLanes / 4];
  std::memcpy(quads, lanes, sizeof(lanes));
#pragma GCC unroll 8
  for (int i = 2; i < kLanes / 4; ++i) f(quads[i % 2], quads[i]);
  f(quads[0], quads[1]);
  f(quads[0], FUSEDLOSS_SHUFFLE(quads[0], quads[0], 2, 3, 0, 1));
  f(quads[0], FUSEDLOSS_SHUFFLE(quads[0], quads[0], 1, 0, 3, 2));
  return quads[0][0];
}

template <class T>
FUSEDLOSS_HD T add_lanes(const T (&lanes)[kLanes]) {
  return merge_lanes(lanes, [](Quad<T>& a, const Quad<T>& b) { a += b; });
}

template <class T>
FUSEDLOSS_HD T max_of_lanes(const T (&lanes)[kLanes]) {
  return merge_lanes(lanes, [](Quad<T>& a, const Quad<T>& b) { a = b > a ? b : a; });
}

// sum += term, with what the addition rounds off in `lost`: smoothing makes many equal terms, which would all be
// rounded the same way.
template <class T>
FUSEDLOSS_HD void add_with_loss(T term, T& sum, T& lost) {
  const T wanted = term - lost, next = sum + wanted;
  lost = (next - sum) - wanted;
  sum = next;
}

// Four values of each of four lines: value i of line j becomes value j of line i.
template <class T>
FUSEDLOSS_HD void transpose(const T* const (&from)[4], T* const (&to)[4]) {
  Quad<T> lines[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) std::memcpy(&lines[j], from[j], sizeof(lines[j]));
  const Quad<T> low = FUSEDLOSS_SHUFFLE(lines[0], lines[1], 0, 4, 1, 5);
  const Quad<T> high = FUSEDLOSS_SHUFFLE(lines[0], lines[1], 2, 6, 3, 7);
  const Quad<T> next_low = FUSEDLOSS_SHUFFLE(lines[2], lines[3], 0, 4, 1, 5);
  const Quad<T> next_high = FUSEDLOSS_SHUFFLE(lines[2], lines[3], 2, 6, 3, 7);
  lines[0] = FUSEDLOSS_SHUFFLE(low, next_low, 0, 1, 4, 5);
  lines[1] = FUSEDLOSS_SHUFFLE(low, next_low, 2, 3, 6, 7);
  lines[2] = FUSEDLOSS_SHUFFLE(high, next_high, 0, 1, 4, 5);
  lines[3] = FUSEDLOSS_SHUFFLE(high, next_high, 2, 3, 6, 7);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(to[i], &lines[i], sizeof(lines[i]));
}

#undef FUSEDLOSS_SHUFFLE

}  // namespace fusedloss::FUSEDLOSS_ISA
