// The softmax driver for any functor; included once per instruction set, after pointwise.inl.
//
// Two ways to go over the logits, chosen by the layout:
// - rows: the classes of a row lie side by side; one row at a time, vectors along the classes;
// - tiles: anything else, and rows too short to fill vectors; kTile rows at a time, vectors across the rows.
// Both read the logits once in forward, and once in backward.

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kTile = 256;
constexpr int64_t kBlock = 4096;        // 16 KB of float: stays in the first-level cache between max and sum
constexpr int64_t kShortestRow = 48;    // below, a row costs more in tails and lane sums than in logits

inline bool along_rows(const SoftmaxLayout& layout) {
  return layout.class_stride == 1 && layout.classes >= kShortestRow;
}

inline int64_t row_offset(const SoftmaxLayout& layout, int64_t row) {
  return row / layout.inner * layout.outer_stride + row % layout.inner * layout.inner_stride;
}

inline bool out_of_range(const SoftmaxArgs& args, int64_t target) {
  return target != args.ignore_index && uint64_t(target) >= uint64_t(args.logits_layout.classes);
}

inline int64_t first_bad_row(const SoftmaxArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (out_of_range(args, args.target[row])) return row;
  }
  return -1;
}

template <class T>
T weight_of(const SoftmaxArgs& args, int64_t target) {
  return args.weight ? static_cast<const T*>(args.weight)[target] : T(1);
}

template <class S>
auto upstream_of(const SoftmaxArgs& args, int64_t row) {
  return load(static_cast<const S*>(args.upstream)[row * args.upstream_stride]);
}

// ---- rows

// A block of logits as arithmetic values, padded with -infinity to whole lanes; the column `hole`, if inside, is left
// out the same way. Float blocks without tail or hole are read where they are.
template <class S>
const Accumulate<S>* stage(const S* logits, int64_t& count, int64_t hole, Accumulate<S>* buffer) {
  using T = Accumulate<S>;
  const bool has_hole = uint64_t(hole) < uint64_t(count);
  if constexpr (std::is_same_v<S, T>) {
    if (count % kLanes == 0 && !has_hole) return logits;
  }
  for (int64_t i = 0; i < count; ++i) buffer[i] = load(logits[i]);
  for (; count % kLanes; ++count) buffer[count] = -infinity<T>();
  if (has_hole) buffer[hole] = -infinity<T>();
  return buffer;
}

template <class T>
T max_of(const T* values, int64_t count) {
  T lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[lane];
  for (int64_t i = kLanes; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  for (int width = kLanes / 2; width; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] = lanes[lane + width] > lanes[lane] ? lanes[lane + width] : lanes[lane];
    }
  }
  return lanes[0];
}

template <class T>
T sum_exp(const T* values, int64_t count, T max) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += exp(values[i + lane] - max);
  }
  return add_lanes(lanes);
}

template <class S>
auto statistics_of(const S* logits, int64_t classes, int64_t target) {
  using T = Accumulate<S>;
  alignas(64) T buffer[kBlock];
  T max = lowest<T>();  // finite, so that a row of -infinity masks is no inf - inf
  double rest = 0;
  for (int64_t block = 0; block < classes; block += kBlock) {
    int64_t count = classes - block < kBlock ? classes - block : kBlock;
    const T* values = stage(logits + block, count, target - block, buffer);
    const T block_max = max_of(values, count);
    if (block_max > max) {
      rest *= double(exp(max - block_max));
      max = block_max;
    }
    rest += double(sum_exp(values, count, max));
  }
  return RowStatistics<T>{max, T(rest)};
}

template <class S, class Loss>
SoftmaxSums forward_rows(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  SoftmaxSums sums = {0, 0, -1};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    T value = 0;
    RowStatistics<T> statistics = {0, 0};
    if (target != args.ignore_index) {
      const S* logits = static_cast<const S*>(args.logits) + row_offset(layout, row);
      statistics = statistics_of(logits, layout.classes, target);
      const T weight = weight_of<T>(args, target);
      value = weight * loss(complete(statistics, T(load(logits[target])))).loss;
      sums.weight += Loss::mean_by_weight ? double(weight) : 1.0;
    }
    sums.loss += double(value);
    if (args.losses) static_cast<S*>(args.losses)[row] = store<S>(value);
    static_cast<T*>(args.statistics)[row] = statistics.max;
    static_cast<T*>(args.statistics)[layout.rows + row] = statistics.rest;
  }
  return sums;
}

template <class S, class Loss>
void backward_rows(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const int64_t grad_stride = args.grad_layout.class_stride;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t target = args.target[r];
    const S* logits = static_cast<const S*>(args.logits) + row_offset(layout, r);
    S* grad = static_cast<S*>(args.grad) + row_offset(args.grad_layout, r);
    if (target == args.ignore_index) {
      for (int64_t c = 0; c < layout.classes; ++c) grad[c * grad_stride] = store<S>(T(0));
      continue;
    }
    const T* statistics = static_cast<const T*>(args.statistics);
    const Row<T> row = complete(RowStatistics<T>{statistics[r], statistics[layout.rows + r]}, T(load(logits[target])));
    const T a = weight_of<T>(args, target) * loss(row).a * T(double(upstream_of<S>(args, r)) * args.scale);
    const T factor = a * row.inverse;
    if (grad_stride == 1) {
#pragma GCC ivdep
      for (int64_t c = 0; c < layout.classes; ++c) grad[c] = store<S>(factor * exp(load(logits[c]) - row.max));
    } else {
      for (int64_t c = 0; c < layout.classes; ++c) {
        grad[c * grad_stride] = store<S>(factor * exp(load(logits[c]) - row.max));
      }
    }
    grad[target * grad_stride] = store<S>(-a * row.q);
  }
}

// ---- tiles

// Where the rows of a tile begin: side by side in memory (kUnit), so that a column of the tile is one vector, or anywhere.
template <bool kUnit>
struct Offsets {
  int64_t first;
  int64_t operator[](int64_t j) const { return first + j; }
  void set(const SoftmaxLayout& layout, int64_t row, int64_t) { first = row_offset(layout, row); }
};
template <>
struct Offsets<false> {
  int64_t offsets[kTile];
  int64_t operator[](int64_t j) const { return offsets[j]; }
  void set(const SoftmaxLayout& layout, int64_t row, int64_t count) {
    for (int64_t j = 0; j < count; ++j) offsets[j] = row_offset(layout, row + j);
  }
};

// Neighbouring rows; y[j] is -1 where the target is ignored.
template <class T, bool kUnit>
struct Tile {
  int64_t count;
  Offsets<kUnit> at;
  typename Constants<T>::Int y[kTile];
  T max[kTile], rest[kTile], logit[kTile];

  void open(const SoftmaxArgs& args, int64_t row, int64_t end) {
    const SoftmaxLayout& layout = args.logits_layout;
    count = end - row < kTile ? end - row : kTile;
    if (kUnit && count > layout.inner - row % layout.inner) count = layout.inner - row % layout.inner;
    at.set(layout, row, count);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t target = args.target[row + j];
      y[j] = typename Constants<T>::Int(target == args.ignore_index ? -1 : target);
    }
  }
};

template <class S, bool kUnit, class Loss>
SoftmaxSums forward_tiles(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  SoftmaxSums sums = {0, 0, -1};
  Tile<T, kUnit> tile;
  T losses[kTile];
  for (int64_t row = begin; row < end; row += tile.count) {
    tile.open(args, row, end);
    const int64_t count = tile.count;
    for (int j = 0; j < kTile; ++j) {
      tile.max[j] = lowest<T>();
      tile.rest[j] = tile.logit[j] = 0;
    }
    const S* logits = static_cast<const S*>(args.logits);
    for (int64_t c = 0; c < layout.classes; ++c, logits += layout.class_stride) {
      const auto column = typename Constants<T>::Int(c);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const T x = load(logits[tile.at[j]]), gap = x - tile.max[j], e = exp(-abs(gap));
        const bool is_target = tile.y[j] == column, higher = gap > 0;
        const T rest = higher ? tile.rest[j] * e + T(1) : tile.rest[j] + e, max = higher ? x : tile.max[j];
        tile.rest[j] = is_target ? tile.rest[j] : rest;
        tile.max[j] = is_target ? tile.max[j] : max;
        tile.logit[j] = is_target ? x : tile.logit[j];
      }
    }
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const T value = loss(complete(RowStatistics<T>{tile.max[j], tile.rest[j]}, tile.logit[j])).loss;
      losses[j] = tile.y[j] < 0 ? T(0) : value;
    }
    for (int64_t j = 0; j < count; ++j) {
      if (tile.y[j] < 0) continue;
      const T weight = weight_of<T>(args, tile.y[j]);
      losses[j] *= weight;
      sums.loss += double(losses[j]);
      sums.weight += Loss::mean_by_weight ? double(weight) : 1.0;
    }
    if (args.losses) {
      S* output = static_cast<S*>(args.losses) + row;
      for (int64_t j = 0; j < count; ++j) output[j] = store<S>(losses[j]);
    }
    T* statistics = static_cast<T*>(args.statistics) + row;
    for (int64_t j = 0; j < count; ++j) statistics[j] = tile.max[j];
    for (int64_t j = 0; j < count; ++j) statistics[layout.rows + j] = tile.rest[j];
  }
  return sums;
}

template <class S, bool kUnit, class Loss>
void backward_tiles(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout &layout = args.logits_layout, &grad_layout = args.grad_layout;
  Tile<T, kUnit> tile;
  Offsets<kUnit> grad_at;
  T factor[kTile], own[kTile];
  for (int64_t row = begin; row < end; row += tile.count) {
    tile.open(args, row, end);
    const int64_t count = tile.count;
    grad_at.set(grad_layout, row, count);
    const S* logits = static_cast<const S*>(args.logits);
    S* grad = static_cast<S*>(args.grad);
    const T* statistics = static_cast<const T*>(args.statistics) + row;
    for (int64_t j = 0; j < count; ++j) {
      const bool kept = tile.y[j] >= 0;
      tile.logit[j] = kept ? load(logits[tile.at[j] + tile.y[j] * layout.class_stride]) : T(0);
      own[j] = kept ? weight_of<T>(args, tile.y[j]) * T(double(upstream_of<S>(args, row + j)) * args.scale) : T(0);
    }
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const bool kept = tile.y[j] >= 0;
      const Row<T> r = complete(RowStatistics<T>{statistics[j], statistics[layout.rows + j]}, tile.logit[j]);
      const T a = own[j] * loss(r).a;
      tile.max[j] = r.max;
      factor[j] = kept ? a * r.inverse : T(0);
      own[j] = -a * r.q;
    }
    for (int64_t c = 0; c < layout.classes; ++c, logits += layout.class_stride, grad += grad_layout.class_stride) {
      const auto column = typename Constants<T>::Int(c);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const T other = factor[j] * exp(load(logits[tile.at[j]]) - tile.max[j]);
        const T kept = tile.y[j] < 0 ? T(0) : other;  // an ignored row may hold NaN
        grad[grad_at[j]] = store<S>(tile.y[j] == column ? own[j] : kept);
      }
    }
  }
}

template <class F>
auto with_functor(Softmax loss, DType dtype, const double* params, F f) {
  using Loss = Softmax;
  switch (loss) { FUSEDLOSS_SOFTMAX(FUSEDLOSS_CASE) }
  __builtin_unreachable();
}

// Runs of rows shorter than this leave most of a vector empty; then every row gets an offset of its own.
constexpr int64_t kShortestRun = 32;

inline bool side_by_side(const SoftmaxLayout& layout) {
  return layout.inner_stride == 1 && layout.inner >= kShortestRun;
}

inline SoftmaxSums softmax_forward(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  const int64_t bad_row = first_bad_row(args, begin, end);
  if (bad_row >= 0) return {0, 0, bad_row};
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    using S = decltype(storage);
    if (along_rows(args.logits_layout)) return forward_rows<S>(functor, args, begin, end);
    return side_by_side(args.logits_layout) ? forward_tiles<S, true>(functor, args, begin, end)
                                            : forward_tiles<S, false>(functor, args, begin, end);
  });
}

inline void softmax_backward(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    using S = decltype(storage);
    if (along_rows(args.logits_layout)) return backward_rows<S>(functor, args, begin, end);
    const bool unit = side_by_side(args.logits_layout) && side_by_side(args.grad_layout);
    unit ? backward_tiles<S, true>(functor, args, begin, end) : backward_tiles<S, false>(functor, args, begin, end);
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
