// The softmax driver for any functor; included once per instruction set, after pointwise.inl.
//
// Rows go in tiles of kTile. Their statistics are collected in one of two ways, chosen by the layout:
// - by rows, where the classes of a row lie side by side: vectors along the classes;
// - by columns, anything else and rows too short to fill vectors: vectors across the rows of the tile.
// What is left to do once a row (exp, log, the functor) is then vector code across the tile in either case.
// Forward reads the logits once; backward reads them once and writes the gradient once.

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kTile = 256;
constexpr int64_t kBlock = 4096;  // 16 KB of float: stays in the first-level cache between max and sum
// Shorter rows cost more in tails and lane sums than in logits; the gradient has no sums.
constexpr int64_t kShortestRowForward = 120, kShortestRowBackward = 24;
constexpr int64_t kShortestRun = 32;  // rows side by side in memory, worth reading as vectors in place

// Not std::min: a standard template compiled here could become the one copy every instruction set runs.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_offset(const SoftmaxLayout& layout, int64_t row) {
  return row / layout.inner * layout.outer_stride + row % layout.inner * layout.inner_stride;
}

inline int64_t first_bad_row(const SoftmaxArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    if (target != args.ignore_index && uint64_t(target) >= uint64_t(args.logits_layout.classes)) return row;
  }
  return -1;
}

template <class S>
auto upstream_of(const SoftmaxArgs& args, int64_t row) {
  return load(static_cast<const S*>(args.upstream)[row * args.upstream_stride]);
}

// Neighbouring rows: y is -1 and the weight 0 where the target is ignored. Padded to whole vectors with ignored rows.
template <class T>
struct Tile {
  int64_t row, count, padded;
  typename Constants<T>::Int y[kTile];
  T weight[kTile], logit[kTile], max[kTile], rest[kTile];

  void open(const SoftmaxArgs& args, int64_t first, int64_t end) {
    row = first;
    count = end - first;
    padded = (count + kLanes - 1) / kLanes * kLanes;
    const T* weights = static_cast<const T*>(args.weight);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t target = args.target[row + j];
      const bool ignored = target == args.ignore_index;
      y[j] = typename Constants<T>::Int(ignored ? -1 : target);
      weight[j] = ignored ? T(0) : (weights ? weights[target] : T(1));
    }
    for (int64_t j = count; j < padded; ++j) {
      y[j] = -1;
      weight[j] = logit[j] = max[j] = rest[j] = 0;
    }
  }
};

// ---- by rows

// A block of a row as runs of whole lanes of arithmetic values. The column `hole`, if inside, is left out, and a tail
// is filled up, with -infinity. Float logits are read where they are, but for the 32 around the hole and the tail.
template <class S>
struct Runs {
  using T = Accumulate<S>;
  struct Run {
    const T* begin;
    int64_t count;
  };
  Run runs[4];
  int size = 0;
  alignas(64) T buffer[std::is_same_v<S, T> ? 2 * kLanes : kBlock + kLanes];

  Runs(const S* logits, int64_t count, int64_t hole) {
    const bool has_hole = uint64_t(hole) < uint64_t(count);
    const int64_t whole = count / kLanes * kLanes;
    if constexpr (std::is_same_v<S, T>) {
      const int64_t group = has_hole ? hole / kLanes * kLanes : whole;
      if (group > 0) runs[size++] = {logits, group};
      if (group < whole) copy(logits + group, kLanes, hole - group, buffer);
      if (group + kLanes < whole) runs[size++] = {logits + group + kLanes, whole - group - kLanes};
      if (whole < count)
        copy(logits + whole, count - whole, has_hole && group == whole ? hole - whole : -1, buffer + kLanes);
    } else {
      copy(logits, count, has_hole ? hole : -1, buffer);
    }
  }

  void copy(const S* logits, int64_t count, int64_t hole, T* to) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) to[padded - kLanes + lane] = -infinity<T>();
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) to[i] = load(logits[i]);
    if (hole >= 0) to[hole] = -infinity<T>();
    runs[size++] = {to, padded};
  }

  T max() const {
    T lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -infinity<T>();
    for (int r = 0; r < size; ++r) {
      const T* values = runs[r].begin;
      for (int64_t i = 0; i < runs[r].count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
        }
      }
    }
    for (int width = kLanes / 2; width; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] = lanes[lane + width] > lanes[lane] ? lanes[lane + width] : lanes[lane];
      }
    }
    return lanes[0];
  }

  T sum_exp(T max) const {
    T lanes[kLanes] = {};
    for (int r = 0; r < size; ++r) {
      const T* values = runs[r].begin;
      for (int64_t i = 0; i < runs[r].count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += exp(values[i + lane] - max);
      }
    }
    return add_lanes(lanes);
  }
};

template <class S>
auto statistics_of(const S* logits, int64_t classes, int64_t target) {
  using T = Accumulate<S>;
  T max = lowest<T>();  // finite, so that a row of -infinity masks is no inf - inf
  double rest = 0;
  for (int64_t block = 0; block < classes; block += kBlock) {
    const Runs<S> runs(logits + block, classes - block < kBlock ? classes - block : kBlock, target - block);
    const T block_max = runs.max();
    if (block_max > max) {
      if (block > 0) rest *= double(exp(max - block_max));
      max = block_max;
    }
    rest += double(runs.sum_exp(max));
  }
  return RowStatistics<T>{max, T(rest)};
}

template <class S>
void collect_by_rows(Tile<Accumulate<S>>& tile, const SoftmaxArgs& args) {
  for (int64_t j = 0; j < tile.count; ++j) {
    tile.logit[j] = tile.max[j] = tile.rest[j] = 0;
    if (tile.y[j] < 0) continue;
    const S* logits = static_cast<const S*>(args.logits) + row_offset(args.logits_layout, tile.row + j);
    const auto statistics = statistics_of(logits, args.logits_layout.classes, tile.y[j]);
    tile.logit[j] = load(logits[tile.y[j]]);
    tile.max[j] = statistics.max;
    tile.rest[j] = statistics.rest;
  }
}

// The gradient a row at a time: factor * exp(x - max), and `own` at the target.
template <class S, class T>
void write_by_rows(const Tile<T>& tile, const SoftmaxArgs& args, const T* factor, const T* own) {
  const int64_t classes = args.logits_layout.classes;
  for (int64_t j = 0; j < tile.count; ++j) {
    const S* logits = static_cast<const S*>(args.logits) + row_offset(args.logits_layout, tile.row + j);
    S* grad = static_cast<S*>(args.grad) + row_offset(args.grad_layout, tile.row + j);
    if (tile.y[j] < 0) {
      for (int64_t c = 0; c < classes; ++c) grad[c] = store<S>(T(0));
      continue;
    }
    const T scale = factor[j], max = tile.max[j];
#pragma GCC ivdep
    for (int64_t c = 0; c < classes; ++c) grad[c] = store<S>(scale * exp(load(logits[c]) - max));
    grad[tile.y[j]] = store<S>(own[j]);
  }
}

// ---- by columns

constexpr int kColumns = 16;

// Columns [first, first + columns) of a tile as vectors across its rows: in place, or moved into a buffer.
template <class S>
struct ColumnBlock {
  const SoftmaxLayout& layout;
  const bool in_place;
  int64_t offset[kTile];
  alignas(64) S buffer[kColumns * kTile];

  explicit ColumnBlock(const SoftmaxLayout& l) : layout(l), in_place(l.inner_stride == 1 && l.inner >= kShortestRun) {}

  void open(int64_t row, int64_t count) {
    for (int64_t j = 0; j < (in_place ? 1 : count); ++j) offset[j] = row_offset(layout, row + j);
  }
  // How many rows from this one on may share a tile: in place, those of its run.
  int64_t rows_left(int64_t row) const { return in_place ? least(kTile, layout.inner - row % layout.inner) : kTile; }
  int64_t stride() const { return in_place ? layout.class_stride : kTile; }

  template <class Pointer>
  Pointer in_memory(Pointer base, int64_t first) const {
    return base + offset[0] + first * layout.class_stride;
  }
  const S* read(const S* base, int64_t first, int64_t columns, int64_t count) {
    if (in_place) return in_memory(base, first);
    for (int64_t j = 0; j < count; ++j) {
      const S* row = base + offset[j] + first * layout.class_stride;
      for (int64_t c = 0; c < columns; ++c) buffer[c * kTile + j] = row[c * layout.class_stride];
    }
    return buffer;
  }
  void write(S* base, int64_t first, int64_t columns, int64_t count) const {
    if (in_place) return;
    for (int64_t j = 0; j < count; ++j) {
      S* row = base + offset[j] + first * layout.class_stride;
      for (int64_t c = 0; c < columns; ++c) row[c * layout.class_stride] = buffer[c * kTile + j];
    }
  }
};

template <class F>
void over_column_blocks(int64_t classes, F f) {
  for (int64_t first = 0; first < classes; first += kColumns) {
    f(first, classes - first < kColumns ? classes - first : kColumns);
  }
}

template <class S>
void collect_by_columns(Tile<Accumulate<S>>& tile, const SoftmaxArgs& args, ColumnBlock<S>& block) {
  using T = Accumulate<S>;
  const int64_t count = tile.count;
  for (int64_t j = 0; j < count; ++j) {
    tile.max[j] = lowest<T>();
    tile.rest[j] = tile.logit[j] = 0;
  }
  block.open(tile.row, count);
  over_column_blocks(args.logits_layout.classes, [&](int64_t first, int64_t columns) {
    const S* column = block.read(static_cast<const S*>(args.logits), first, columns, count);
    for (int64_t c = first; c < first + columns; ++c, column += block.stride()) {
      const auto index = typename Constants<T>::Int(c);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        // One exp serves both cases: x above the running max rescales the sum, x below adds to it.
        const T x = load(column[j]), gap = x - tile.max[j], e = exp(-abs(gap));
        const bool is_target = tile.y[j] == index, higher = gap > 0;
        const T rest = select(higher, tile.rest[j] * e + T(1), tile.rest[j] + e);
        tile.rest[j] = select(is_target, tile.rest[j], rest);
        tile.max[j] = select(is_target, tile.max[j], select(higher, x, tile.max[j]));
        tile.logit[j] = select(is_target, x, tile.logit[j]);
      }
    }
  });
}

template <class S, class T>
void write_by_columns(const Tile<T>& tile, const SoftmaxArgs& args, const T* factor, const T* own,
                      ColumnBlock<S>& logits, ColumnBlock<S>& grad) {
  const int64_t count = tile.count;
  logits.open(tile.row, count);
  grad.open(tile.row, count);
  over_column_blocks(args.logits_layout.classes, [&](int64_t first, int64_t columns) {
    const S* from = logits.read(static_cast<const S*>(args.logits), first, columns, count);
    S* base = static_cast<S*>(args.grad);
    S* to = grad.in_place ? grad.in_memory(base, first) : grad.buffer;
    for (int64_t c = first; c < first + columns; ++c, from += logits.stride(), to += grad.stride()) {
      const auto index = typename Constants<T>::Int(c);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const T other = factor[j] * exp(load(from[j]) - tile.max[j]);
        const T value = select(tile.y[j] == index, own[j], other);
        to[j] = store<S>(select(tile.y[j] < 0, T(0), value));  // the logits of an ignored row may be NaN
      }
    }
    grad.write(base, first, columns, count);
  });
}

// ---- both

template <class S, class Loss>
SoftmaxSums forward(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const bool rows = layout.class_stride == 1 && layout.classes >= kShortestRowForward;
  SoftmaxSums sums = {0, 0, -1};
  Tile<T> tile;
  ColumnBlock<S> block(layout);
  T losses[kTile];
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, rows ? kTile : block.rows_left(first));
    tile.open(args, first, stop);
    rows ? collect_by_rows<S>(tile, args) : collect_by_columns<S>(tile, args, block);

    T loss_lanes[kLanes] = {}, weight_lanes[kLanes] = {};
    for (int64_t j = 0; j < tile.padded; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t i = j + lane;
        const T value = loss(complete(RowStatistics<T>{tile.max[i], tile.rest[i]}, tile.logit[i])).loss;
        const bool ignored = tile.y[i] < 0;
        losses[i] = select(ignored, T(0), value * tile.weight[i]);
        loss_lanes[lane] += losses[i];
        weight_lanes[lane] += Loss::mean_by_weight ? tile.weight[i] : select(ignored, T(0), T(1));
      }
    }
    sums.loss += double(add_lanes(loss_lanes));
    sums.weight += double(add_lanes(weight_lanes));

    if (args.losses) {
      S* output = static_cast<S*>(args.losses) + first;
      for (int64_t j = 0; j < tile.count; ++j) output[j] = store<S>(losses[j]);
    }
    T* statistics = static_cast<T*>(args.statistics) + first;
    for (int64_t j = 0; j < tile.count; ++j) statistics[j] = tile.max[j];
    for (int64_t j = 0; j < tile.count; ++j) statistics[layout.rows + j] = tile.rest[j];
  }
  return sums;
}

template <class S, class Loss>
void backward(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  const bool rows =
      layout.class_stride == 1 && args.grad_layout.class_stride == 1 && layout.classes >= kShortestRowBackward;
  Tile<T> tile;
  ColumnBlock<S> logits(layout), grad(args.grad_layout);
  T factor[kTile], own[kTile];
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, rows ? kTile : least(logits.rows_left(first), grad.rows_left(first)));
    tile.open(args, first, stop);
    const T* statistics = static_cast<const T*>(args.statistics) + first;
    for (int64_t j = 0; j < tile.count; ++j) {
      const int64_t target = tile.y[j] < 0 ? 0 : tile.y[j];
      tile.logit[j] =
          load(static_cast<const S*>(args.logits)[row_offset(layout, first + j) + target * layout.class_stride]);
      tile.weight[j] *= T(double(upstream_of<S>(args, first + j)) * args.scale);
      tile.max[j] = statistics[j];
      tile.rest[j] = statistics[layout.rows + j];
    }
    for (int64_t j = 0; j < tile.padded; ++j) {
      const Row<T> row = complete(RowStatistics<T>{tile.max[j], tile.rest[j]}, tile.logit[j]);
      const T a = tile.weight[j] * loss(row).a;
      factor[j] = a * row.inverse;
      own[j] = -a * row.q;
      tile.max[j] = row.max;
    }
    rows ? write_by_rows<S>(tile, args, factor, own) : write_by_columns<S>(tile, args, factor, own, logits, grad);
  }
}

inline SoftmaxSums softmax_forward(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  const int64_t bad_row = first_bad_row(args, begin, end);
  if (bad_row >= 0) return {0, 0, bad_row};
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    return forward<decltype(storage)>(functor, args, begin, end);
  });
}

inline void softmax_backward(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  with_functor(loss, args.dtype, args.params,
               [&](const auto& functor, auto storage) { backward<decltype(storage)>(functor, args, begin, end); });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
