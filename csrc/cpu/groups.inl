// How kLanes neighbouring numbers of a storage type become lanes of the arithmetic type, and lanes such numbers.
#pragma once

#include "lanes.inl"
#include "widen.inl"

namespace fusedloss::FUSEDLOSS_ISA {

template <class S>
struct InOrder {
  static constexpr int column_of(int lane) { return lane; }
  template <class T>
  static void read(const S* from, T* lanes) {
    widen(from, kLanes, lanes);
  }
  template <class T>
  static void write(const T* lanes, S* to) {
    narrow(lanes, kLanes, to);
  }
};

// In the order that is read fastest.
template <class S>
struct Group : InOrder<S> {};

// The even columns and then the odd ones: one operation makes a float of either half of a 32-bit word, where numbers
// in order take two.
template <>
struct Group<bf16> {
  static constexpr int kWords = kLanes / 2;
  static constexpr int column_of(int lane) { return lane < kWords ? 2 * lane : 2 * (lane - kWords) + 1; }

  static void read(const bf16* from, float* lanes) {
    uint32_t words[kWords];
    std::memcpy(words, from, sizeof(words));
#pragma GCC ivdep
    for (int i = 0; i < kWords; ++i) {
      lanes[i] = bit_cast<float>(words[i] << 16);
      lanes[kWords + i] = bit_cast<float>(words[i] & 0xffff0000u);
    }
  }
  static void write(const float* lanes, bf16* to) {
    uint32_t words[kWords];
#pragma GCC ivdep
    for (int i = 0; i < kWords; ++i) {
      words[i] = bits_of_bf16(lanes[i]) >> 16 | (bits_of_bf16(lanes[kWords + i]) & 0xffff0000u);
    }
    std::memcpy(to, words, sizeof(words));
  }
};

// `count` numbers into lanes and back, whole groups of them in the given order. What stands `count` numbers further,
// the next tile of a loop, comes into the caches meanwhile.
template <template <class> class Order, class T, class S>
void read_tile(const S* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(from + i + count, 0, 2);
    Order<S>::read(from + i, to + i);
  }
  widen(from + i, count - i, to + i);
}
template <template <class> class Order, class T, class S>
void write_tile(const T* from, int64_t count, S* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(to + i + count, 1, 2);
    Order<S>::write(from + i, to + i);
  }
  narrow(from + i, count - i, to + i);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half of a word is the first number");

}  // namespace fusedloss::FUSEDLOSS_ISA
