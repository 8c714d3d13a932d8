// The softmax driver for any functor, what its two passes share; included by both.
//
// Rows go in tiles of kTile. Their statistics are collected in one of two ways, chosen by the layout:
// - by rows (softmax_rows.inl), where the classes of a row lie side by side: vectors along the classes;
// - by columns (softmax_columns.inl), anything else and rows too short to fill vectors: vectors across the rows.
// What is left to do once a row (exp, log, the functor) is then vector code across the tile in either case.
// Forward reads the logits once; backward reads them once and writes the gradient once.
#pragma once

#include "../with_functor.h"
#include "lanes.inl"

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kTile = 256;

// Not std::min: a standard template compiled here could become the one copy every instruction set runs.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_offset(const SoftmaxLayout& layout, int64_t row) {
  return row / layout.inner * layout.outer_stride + row % layout.inner * layout.inner_stride;
}

// row_offset of one row after the other: a division per tile, not per row, where it would cost as much as ten logits.
struct RowOffsets {
  const SoftmaxLayout& layout;
  int64_t outer, inner;

  RowOffsets(const SoftmaxLayout& layout_, int64_t row)
      : layout(layout_), outer(row / layout_.inner), inner(row % layout_.inner) {}

  // The next rows, at most `most`, that lie inner_stride apart.
  struct Run {
    int64_t offset, count;
  };
  Run next(int64_t most) {
    const Run run = {outer * layout.outer_stride + inner * layout.inner_stride, least(most, layout.inner - inner)};
    inner += run.count;
    if (inner == layout.inner) {
      inner = 0;
      ++outer;
    }
    return run;
  }
  int64_t next() { return next(1).offset; }
};

// Calls f with the class indices as the integers they are.
template <class F>
auto with_targets(const SoftmaxArgs& args, F f) {
  return args.byte_target ? f(static_cast<const uint8_t*>(args.target)) : f(static_cast<const int64_t*>(args.target));
}

// Upstream gradients of `count` rows: of dtype or of its arithmetic type, one for all rows or one each, `otherwise`
// where null.
template <class S>
void read_upstream(const void* upstream, int64_t stride, bool wide, int64_t row, int64_t count, Accumulate<S> otherwise,
                   Accumulate<S>* to) {
  using T = Accumulate<S>;
  const auto value = [&](int64_t j) {
    const int64_t i = (row + j) * stride;
    return wide ? static_cast<const T*>(upstream)[i] : T(load(static_cast<const S*>(upstream)[i]));
  };
  const bool one = !upstream || stride == 0;
  const T of_all = upstream ? value(0) : otherwise;
  for (int64_t j = 0; j < count; ++j) to[j] = one ? of_all : value(j);
}

template <class S>
void store_results(void* to, bool wide, int64_t first, const Accumulate<S>* from, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    if (wide) {
      static_cast<Accumulate<S>*>(to)[first + j] = from[j];
    } else {
      static_cast<S*>(to)[first + j] = store<S>(from[j]);
    }
  }
}

// Neighbouring rows, padded to whole vectors with rows that count nowhere.
// y is -1 where there is no target: ignored rows, and all rows of class probabilities.
template <class T>
struct Tile {
  using Int = typename Constants<T>::Int;
  int64_t row, count, padded;
  bool all_active;
  Int y[kTile];
  T counts[kTile];                              // 1 where the row counts, 0 where it is ignored
  T weight[kTile], logit[kTile], slope[kTile];  // of the target; the logit as z, -infinity where there is none
  T max[kTile], rest[kTile], sum[kTile], mass[kTile];

  RowStatistics<T> statistics(int64_t j) const { return {max[j], rest[j], sum[j], mass[j]}; }
  void set(int64_t j, const RowStatistics<T>& row_statistics) {
    max[j] = row_statistics.max;
    rest[j] = row_statistics.rest;
    sum[j] = row_statistics.sum;
    mass[j] = row_statistics.mass;
  }
  // Whether the row has a gradient, or a second result.
  bool active(int64_t j) const { return all_active || counts[j] != T(0); }

  // all_second: ignored rows have a second result, too.
  void open(const SoftmaxArgs& args, int64_t first, int64_t end, bool all_second) {
    row = first;
    count = end - first;
    padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = args.target ? count : 0; j < padded; ++j) {
      y[j] = -1;
      counts[j] = T(j < count);
    }
    int64_t ignored = 0;
    if (args.target) ignored = with_targets(args, [&](const auto* target) { return read(target, args.ignore_index); });
    all_active = all_second || ignored == 0;
    const T* weights = static_cast<const T*>(args.weight);
    for (int64_t j = 0; j < padded; ++j) weight[j] = weights && y[j] >= 0 ? weights[y[j]] : counts[j];
    for (int64_t j = count; j < padded; ++j) {
      logit[j] = slope[j] = 0;
      set(j, {0, 0, 0, 0});
    }
  }

  // Returns how many rows are ignored.
  template <class Index>
  int64_t read(const Index* target, int64_t ignore_index) {
    Int ignored = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t of_row = target[row + j];
      y[j] = Int(of_row == ignore_index ? -1 : of_row);
      counts[j] = of_row == ignore_index ? T(0) : T(1);
      ignored += of_row == ignore_index;
    }
    return ignored;
  }

  template <class S, class Loss>
  void read_logits(const Loss& loss, const SoftmaxArgs& args) {
    const SoftmaxLayout& layout = args.logits_layout;
    RowOffsets offsets(layout, row);
    for (int64_t first = 0; first < count;) {
      const auto [offset, rows] = offsets.next(count - first);
      const S* logits = static_cast<const S*>(args.logits) + offset;
      for (int64_t j = first; j < first + rows; ++j) {
        const int64_t target = y[j] < 0 ? 0 : y[j];
        logit[j] = load(logits[(j - first) * layout.inner_stride + target * layout.class_stride]);
      }
      first += rows;
    }
    for (int64_t j = 0; j < padded; ++j) {
      const ZAndSlope<T> z = loss.logit(logit[j]);
      logit[j] = select(y[j] < 0, -infinity<T>(), z.z);
      slope[j] = z.slope;
    }
  }
};

// Per row of a tile, the coefficients of the gradient: p_c is exp(z_c - max) / total, `own` goes to the target.
template <class T>
struct Gradients {
  T factor[kTile], lean[kTile], share[kTile], own[kTile];
};

// k_c along a row whose classes lie side by side.
template <class P, bool kWeighted, class Loss, class T>
struct Factors {
  const Loss& loss;
  const T* weights;
  const P* probabilities;

  Factors(const Loss& loss_, const SoftmaxArgs& args, int64_t row)
      : loss(loss_),
        weights(static_cast<const T*>(args.weight)),
        probabilities(static_cast<const P*>(args.probabilities)) {
    if (Loss::soft) probabilities += row_offset(args.probabilities_layout, row);
  }
  T operator()(int64_t c) const {
    return loss.factor(kWeighted ? weights[c] : T(1), Loss::soft ? load(probabilities[c]) : T(0));
  }
};

// Calls f with them; only losses that sum them know of weights there.
template <class P, class T, class Loss, class F>
void with_factors(const Loss& loss, const SoftmaxArgs& args, int64_t row, F f) {
  if constexpr (Loss::sum == Sum::linear) {
    if (args.weight) return f(Factors<P, true, Loss, T>(loss, args, row));
  }
  f(Factors<P, false, Loss, T>(loss, args, row));
}

// Calls f with a functor, a storage type and that of the probabilities.
template <class F>
auto with_types(Softmax loss, const SoftmaxArgs& args, F f) {
  return with_functor(loss, args, [&](const auto& functor, auto storage) {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::soft) {
      return with_probabilities(args, storage, [&](auto probability) { return f(functor, storage, probability); });
    } else {
      return f(functor, storage, storage);
    }
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA

#include "softmax_rows.inl"
#include "stream.inl"
#include "softmax_columns.inl"
