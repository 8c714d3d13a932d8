// A tile of neighbouring rows: their statistics, and the work that is done once a row, as vector code across the rows.
#pragma once

#include "../kernels/cpu.h"
#include "../kernels/functors.h"
#include "lanes.inl"

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kTile = 256;

// Not std::min: a standard template compiled here could become the one copy every instruction set runs.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// row_offset of one row after the other: a division per tile, not per row.
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

// Calls f with a value of the type of results and upstream gradients: dtype, or where `wide` its arithmetic type T.
template <class T, class F>
void with_result_type(const SoftmaxArgs& args, F f) {
  if (args.wide) return f(T());
  with_storage(args.dtype, [&](auto storage) {
    if constexpr (std::is_same_v<Accumulate<decltype(storage)>, T>) f(storage);
  });
}

// Reads the upstream gradients of `count` rows, one for all or one each; `otherwise` where there is none.
template <class T>
void read_upstream(const SoftmaxArgs& args, const void* upstream, int64_t stride, int64_t row, int64_t count,
                   T otherwise, T* to) {
  with_result_type<T>(args, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(upstream);
    const bool one = !upstream || stride == 0;
    const T of_all = upstream ? T(load(values[row * stride])) : otherwise;
    for (int64_t j = 0; j < count; ++j) to[j] = one ? of_all : T(load(values[(row + j) * stride]));
  });
}

template <class T>
void store_results(const SoftmaxArgs& args, void* to, int64_t first, const T* from, int64_t count) {
  with_result_type<T>(args, [&](auto type) {
    using Result = decltype(type);
    for (int64_t j = 0; j < count; ++j) static_cast<Result*>(to)[first + j] = store<Result>(from[j]);
  });
}

// Neighbouring rows, padded to whole vectors with rows that count nowhere. y is -1 where there is no target: in ignored
// rows, those of sample weight 0 among them, and in all rows of class probabilities.
template <class T>
struct Tile {
  using Int = typename Constants<T>::Int;
  int64_t row, count, padded;
  bool all_active;
  Int y[kTile];
  T counts[kTile];                              // the row's sample weight, or 1; 0 where it is ignored
  T weight[kTile], logit[kTile], slope[kTile];  // of the target; the logit as z, -infinity where there is none
  T max[kTile], sum_without_target[kTile], sum[kTile], mass[kTile];

  RowStatistics<T> statistics(int64_t j) const { return {max[j], sum_without_target[j], sum[j], mass[j]}; }
  void set(int64_t j, const RowStatistics<T>& row_statistics) {
    max[j] = row_statistics.max;
    sum_without_target[j] = row_statistics.sum_without_target;
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
    const T* weights = static_cast<const T*>(args.weight);
    for (int64_t j = 0; j < padded; ++j) weight[j] = weights && y[j] >= 0 ? weights[y[j]] : counts[j];
    if (args.sample_weight) ignored = weigh(static_cast<const T*>(args.sample_weight));
    all_active = all_second || ignored == 0;
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

  // Lets the rows count what they weigh. Returns how many are ignored.
  int64_t weigh(const T* sample_weights) {
    int64_t ignored = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (counts[j] != T(0)) counts[j] = sample_weights[row + j];
      if (counts[j] != T(0)) continue;
      y[j] = -1;
      weight[j] = 0;
      ++ignored;
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

// GradientOfRow for each row of a tile.
template <class T>
struct Gradients {
  T exponential_coefficient[kTile], entropy_coefficient[kTile], factor_coefficient[kTile], own[kTile];

  ColumnCoefficients<T> of_columns(int64_t j) const {
    return {exponential_coefficient[j], entropy_coefficient[j], factor_coefficient[j]};
  }
  void set(int64_t j, const GradientOfRow<T>& gradient) {
    exponential_coefficient[j] = gradient.columns.exponential;
    entropy_coefficient[j] = gradient.columns.entropy;
    factor_coefficient[j] = gradient.columns.factor;
    own[j] = gradient.own;
  }
};

inline void add(SoftmaxSums& to, const SoftmaxSums& from) {
  to.loss += from.loss;
  to.weight += from.weight;
}

// Finishes a tile: writes losses and statistics, returns the sums.
template <class T, class Loss>
SoftmaxSums finish(const Loss& loss, const Tile<T>& tile, const SoftmaxArgs& args) {
  T losses[kTile], second[kTile], loss_lanes[kLanes] = {}, weight_lanes[kLanes] = {};
  const T all_active = T(tile.all_active);
  for (int64_t j = 0; j < tile.padded; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = j + lane;
      const Row<T> row = complete<Loss>(tile.statistics(i), tile.logit[i], tile.weight[i]);
      const T value = loss.value(row, tile.weight[i]);
      second[i] = select(tile.counts[i] + all_active == T(0), T(0), loss.second(row));
      const bool ignored = tile.counts[i] == T(0);
      losses[i] = select(ignored, T(0), tile.counts[i] * value);
      loss_lanes[lane] += losses[i];
      weight_lanes[lane] += tile.counts[i] * weight_in_mean<Loss>(tile.weight[i]);
    }
  }
  if (args.losses) store_results(args, args.losses, tile.row, losses, tile.count);
  if (args.second) store_results(args, args.second, tile.row, second, tile.count);
  T* saved = static_cast<T*>(args.statistics) + tile.row;
  const int64_t rows = args.logits_layout.rows;
  for (int64_t j = 0; j < tile.count; ++j) saved[j] = tile.max[j];
  for (int64_t j = 0; j < tile.count; ++j) saved[rows + j] = tile.sum_without_target[j];
  for (int64_t j = 0; j < tile.count && Loss::Sum::saved >= 3; ++j) {
    saved[2 * rows + j] = Loss::Sum::third(tile.statistics(j));
  }
  for (int64_t j = 0; j < tile.count && Loss::Sum::saved == 4; ++j) saved[3 * rows + j] = tile.mass[j];
  return {double(add_lanes(loss_lanes)), double(add_lanes(weight_lanes)), -1};
}

// Turns a tile's statistics into the coefficients of its gradient, and its max into that over all columns.
template <class T, class Loss>
void coefficients(const Loss& loss, Tile<T>& tile, const SoftmaxArgs& args, Gradients<T>& gradients) {
  T upstream[kTile], upstream_second[kTile];
  read_upstream(args, args.upstream, args.upstream_stride, tile.row, tile.count, T(1), upstream);
  read_upstream(args, args.upstream_second, args.upstream_second_stride, tile.row, tile.count, T(0), upstream_second);
  for (int64_t j = 0; j < tile.count; ++j) {
    upstream[j] = select(tile.counts[j] == T(0), T(0), T(double(upstream[j]) * args.scale * double(tile.counts[j])));
  }
  for (int64_t j = tile.count; j < tile.padded; ++j) upstream[j] = upstream_second[j] = 0;
  for (int64_t j = 0; j < tile.padded; ++j) {
    const Row<T> row = complete<Loss>(tile.statistics(j), tile.logit[j], tile.weight[j]);
    const ZAndSlope<T> target = {tile.logit[j], tile.slope[j]};
    gradients.set(j, gradient_of_row(loss, row, target, tile.weight[j], upstream[j], upstream_second[j]));
    tile.max[j] = row.max;
  }
}

}  // namespace fusedloss::FUSEDLOSS_ISA
