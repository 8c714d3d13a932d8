// A block of a row whose classes lie side by side, as groups of lanes.
#pragma once

#include "groups.inl"

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int64_t kBlock = 4096;  // 16 KB of float: stays in the first-level cache between max and sum

// Groups of kLanes values of z, and their max. Float logits that are z already are read in place, all others from a
// buffer. `skipped_column`, if it is in the block, reads as -infinity, and so does the filling of the last group.
template <class S, class Logit>
struct Groups {
  using T = Accumulate<S>;
  static constexpr bool kReadsInPlace = std::is_same_v<S, T> && !Logit::changes;
  const Logit& logit;
  const S* logits;
  int64_t size;
  T max;
  const T* place[kReadsInPlace ? kBlock / kLanes : 1];
  alignas(64) T buffer[kReadsInPlace ? 2 * kLanes : kBlock];

  // A group that a row's last columns do not fill begins before them: the row has kLanes columns or more.
  Groups(const Logit& logit_, const S* logits_, int64_t count, int64_t skipped_column)
      : logit(logit_), logits(logits_), size((count + kLanes - 1) / kLanes) {
    const int64_t whole = count / kLanes, filled = count - whole * kLanes;
    const int64_t skipped_group = uint64_t(skipped_column) < uint64_t(count) ? skipped_column / kLanes : -1;
    const int64_t before = skipped_group < 0 ? whole : least(skipped_group, whole);
    T lanes[2 * kLanes];  // twice as many, so that one comparison need not wait for the one before
    for (T& lane : lanes) lane = -infinity<T>();
    take_all(0, before, lanes);
    take_all(before + 1, whole, lanes);
    if (before < whole) {
      T* to = kReadsInPlace ? buffer : buffer + before * kLanes;
      take_part(before, logits + before * kLanes, 0, skipped_column - before * kLanes, to);
      raise<1>(lanes, to);
    }
    if (filled) {
      T* to = buffer + (kReadsInPlace ? 1 : whole) * kLanes;
      take_part(whole, logits + count - kLanes, kLanes - filled, skipped_column - (count - kLanes), to);
      raise<1>(lanes, to);
    }
    raise<1>(lanes, lanes + kLanes);
    T all[kLanes];
    std::memcpy(all, lanes, sizeof(all));
    max = max_of_lanes(all);
  }

  const T* operator[](int64_t g) const { return kReadsInPlace ? place[g] : buffer + g * kLanes; }

  // The sum of exp(z - max). The exponentials go to `kept`: in the order of the columns where that is the memory of the
  // gradient, `grad`, else group by group.
  T sum_kept(T of_row, int64_t count, T* kept, S* grad) const {
    T lanes[kLanes] = {}, last[kLanes];
    for (int64_t g = 0; g < size; ++g) {
      const T* values = (*this)[g];
      const bool apart = kReadsInPlace && (g + 1) * kLanes > count;
      T* to = apart ? last : kept + g * kLanes;
      fetch_ahead<false>(logits, g);
      fetch_ahead<true>(grad, g);
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) {
        const T e = exp(values[lane] - of_row);
        lanes[lane] += e;
        to[lane] = e;
      }
    }
    const int64_t filled = kReadsInPlace ? count % kLanes : 0;
    for (int64_t i = 0; i < filled; ++i) kept[count - filled + i] = last[kLanes - filled + i];
    return add_lanes(lanes);
  }

  // The sum of f(z - max).
  template <class F>
  T sum(T of_row, F f) const {
    T lanes[kLanes] = {};
    for (int64_t g = 0; g < size; ++g) {
      const T* values = (*this)[g];
      fetch_ahead<false>(logits, g);
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += f(values[lane] - of_row);
    }
    return add_lanes(lanes);
  }

 private:
  template <int kGroups>
  static FUSEDLOSS_HD void raise(T* lanes, const T* values) {
    for (int lane = 0; lane < kGroups * kLanes; ++lane) {
      lanes[lane] = values[lane] > lanes[lane] ? values[lane] : lanes[lane];
    }
  }

  FUSEDLOSS_HD const T* whole_group(int64_t g) const {
    if constexpr (kReadsInPlace) return logits + g * kLanes;
    return buffer + g * kLanes;
  }

  FUSEDLOSS_HD void take(int64_t g) {
    if constexpr (kReadsInPlace) {
      place[g] = logits + g * kLanes;
    } else {
      read(logits + g * kLanes, buffer + g * kLanes);
    }
  }

  FUSEDLOSS_HD void take_all(int64_t g, int64_t end, T* lanes) {
    for (; g + 1 < end; g += 2) {
      take(g);
      take(g + 1);
      raise<2>(lanes, whole_group(g));
    }
    if (g < end) {
      take(g);
      raise<1>(lanes, whole_group(g));
    }
  }

  // A group without its columns before `first` and the skipped one.
  void take_part(int64_t g, const S* from, int64_t first, int64_t skipped, T* to) {
    using Int = typename Constants<T>::Int;
    read(from, to);
    for (Int lane = 0; lane < kLanes; ++lane) {
      const Int column = Int(Group<S>::column_of(int(lane)));
      to[lane] = select(int(column < Int(first)) | int(column == Int(skipped)), -infinity<T>(), to[lane]);
    }
    if constexpr (kReadsInPlace) place[g] = to;
  }

  FUSEDLOSS_HD void read(const S* from, T* to) const {
    Group<S>::read(from, to);
    if constexpr (Logit::changes) {
      for (int lane = 0; lane < kLanes; ++lane) to[lane] = logit(to[lane]).z;
    }
  }

  // Brings what stands a block further into the caches while exponentials are taken: else memory would wait for the
  // arithmetic, and then the arithmetic for memory. (512, 32000) bfloat16 takes 0.44 ns a logit and core, without 0.70.
  template <bool kWritten>
  static FUSEDLOSS_HD void fetch_ahead(const S* block, int64_t g) {
    const char* ahead = reinterpret_cast<const char*>(block + kBlock + g * kLanes);
#pragma GCC unroll 4
    for (size_t line = 0; line < kLanes * sizeof(S); line += 64) __builtin_prefetch(ahead + line, kWritten, 2);
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
