// Rows whose classes lie apart, or are few: vectors across the rows of a tile.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kColumns = 32;          // of a block: with kTile rows 32 KB of float, between max and sum
constexpr int64_t kShortestRun = 32;  // rows side by side in memory, worth reading as vectors in place

// Columns [first, first + columns) of a tile as vectors across its rows: in place, or moved through a buffer.
template <class S>
struct ColumnBlock {
  const SoftmaxLayout& layout;
  const bool in_place;
  int64_t offset[kTile];
  alignas(64) S buffer[kColumns * kTile];

  explicit ColumnBlock(const SoftmaxLayout& l) : layout(l), in_place(l.inner_stride == 1 && l.inner >= kShortestRun) {}

  void open(int64_t row, int64_t count) {
    RowOffsets offsets(layout, row);
    for (int64_t j = 0; j < (in_place ? 1 : count); ++j) offset[j] = offsets.next();
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

template <class S, class P, class Loss>
struct Columns {
  using T = Accumulate<S>;
  using Int = typename Constants<T>::Int;
  const Loss& loss;
  const SoftmaxArgs& args;
  ColumnBlock<S> logits, grad;
  ColumnBlock<P> probabilities;
  alignas(64) T z[kColumns * kTile] = {};  // rows beyond a tile's last are worked on too, and left out

  Columns(const Loss& loss_, const SoftmaxArgs& args_)
      : loss(loss_),
        args(args_),
        logits(args_.logits_layout),
        grad(args_.grad ? args_.grad_layout : args_.logits_layout),
        probabilities(Loss::soft ? args_.probabilities_layout : args_.logits_layout) {}

  int64_t rows_left(int64_t row) const {
    return least(logits.rows_left(row), least(grad.rows_left(row), probabilities.rows_left(row)));
  }

  // Calls f(first column, columns, logits, probabilities) for one block after the other.
  template <class F>
  void over_blocks(const Tile<T>& tile, F f) {
    logits.open(tile.row, tile.count);
    if (Loss::soft) probabilities.open(tile.row, tile.count);
    const int64_t classes = args.logits_layout.classes;
    for (int64_t first = 0; first < classes; first += kColumns) {
      const int64_t columns = least(kColumns, classes - first);
      const P* t = nullptr;
      if (Loss::soft) {
        t = probabilities.read(static_cast<const P*>(args.probabilities), first, columns, tile.count);
      }
      f(first, columns, logits.read(static_cast<const S*>(args.logits), first, columns, tile.count), t);
    }
  }

  T weight_of(int64_t c) const { return args.weight ? static_cast<const T*>(args.weight)[c] : T(1); }

  // Sums in T within a block and in double across blocks: there may be a hundred thousand classes.
  struct Totals {
    T max[kTile] = {};
    double rest[kTile], sum[kTile], mass[kTile];
  };

  void collect(Tile<T>& tile) {
    const int64_t count = tile.count;
    Totals totals;
    for (int64_t j = 0; j < count; ++j) {
      totals.max[j] = lowest<T>();  // finite: a row of -infinity masks is no inf - inf
      totals.rest[j] = totals.sum[j] = totals.mass[j] = 0;
    }
    over_blocks(tile, [&](int64_t first, int64_t columns, const S* from, const P* t) {
      read_block(tile, first, columns, from);
      for (int64_t j = 0; j < count; j += kLanes) {
        if (logits.in_place) prefetch(from + count + j, columns);
        add_lanes_of_block(tile, totals, first, columns, t, j);
      }
      first == 0 ? set_block(tile, totals) : add_block(tile, totals);
    });
    for (int64_t j = 0; j < count; ++j) {
      tile.set(j, {totals.max[j], T(totals.rest[j]), T(totals.sum[j]), T(totals.mass[j])});
    }
  }

  // Moves a block to z, -infinity in place of targets.
  void read_block(const Tile<T>& tile, int64_t first, int64_t columns, const S* from) {
    for (int64_t c = 0; c < columns; ++c) {
      const S* column = from + c * logits.stride();
      T* to = z + c * kTile;
#pragma GCC ivdep
      for (int64_t j = 0; j < tile.count; ++j) to[j] = loss.logit(load(column[j])).z;
    }
    if (Loss::soft) return;
    for (int64_t j = 0; j < tile.count; ++j) {
      const int64_t place = tile.y[j] - first;
      if (place >= 0 && place < columns) z[place * kTile + j] = -infinity<T>();
    }
  }

  // Statistics of a block for the rows [j, j + kLanes), whose numbers stay in registers from column to column.
  void add_lanes_of_block(Tile<T>& tile, const Totals& totals, int64_t first, int64_t columns, const P* t, int64_t j) {
    T max[kLanes], rest[kLanes] = {}, sum[kLanes] = {}, mass[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) max[lane] = totals.max[j + lane];
    for (int64_t c = 0; c < columns; ++c) {
      const T* values = z + c * kTile + j;
      for (int lane = 0; lane < kLanes; ++lane) max[lane] = values[lane] > max[lane] ? values[lane] : max[lane];
    }
    for (int64_t c = 0; c < columns; ++c) {
      const T* values = z + c * kTile + j;
      const auto index = Int(first + c);
      [[maybe_unused]] const T weight = weight_of(index);
      [[maybe_unused]] const P* of_column = Loss::soft ? t + c * probabilities.stride() + j : nullptr;
      [[maybe_unused]] const int64_t inside = least(kLanes, tile.count - j);
      for (int lane = 0; lane < kLanes; ++lane) {
        const T gap = values[lane] - max[lane], e = exp(gap);
        rest[lane] += e;
        if constexpr (Loss::sum == Sum::entropy) sum[lane] += entropy_term(e, gap);
        if constexpr (Loss::sum == Sum::linear && !Loss::soft) {
          const T factor = select(tile.y[j + lane] == index, T(0), weight);
          sum[lane] += linear_term(factor, -gap);
          mass[lane] += factor;
        }
      }
      if constexpr (Loss::soft) {
        for (int lane = 0; lane < inside; ++lane) {
          const T factor = loss.factor(weight, load(of_column[lane]));
          sum[lane] += linear_term(factor, max[lane] - values[lane]);
          mass[lane] += factor;
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) tile.set(j + lane, {max[lane], rest[lane], sum[lane], mass[lane]});
  }

  // The next tile's lines on their way while this one is worked on: its runs are too short for the hardware to see.
  void prefetch(const S* from, int64_t columns) const {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < kLanes; i += kLine) __builtin_prefetch(from + c * logits.stride() + i);
    }
  }

  void set_block(const Tile<T>& tile, Totals& totals) {
    for (int64_t j = 0; j < tile.count; ++j) {
      totals.max[j] = tile.max[j];
      totals.rest[j] = double(tile.rest[j]);
      if constexpr (Loss::sum != Sum::none) totals.sum[j] = double(tile.sum[j]);
      if constexpr (Loss::sum == Sum::linear) totals.mass[j] = double(tile.mass[j]);
    }
  }

  void add_block(const Tile<T>& tile, Totals& totals) {
    for (int64_t j = 0; j < tile.count; ++j) {
      const T gap = totals.max[j] - tile.max[j], shrunk = exp(gap);
      if constexpr (Loss::sum == Sum::linear) {
        const double moved = totals.mass[j] == 0 ? 0 : totals.mass[j] * double(gap);
        totals.sum[j] += double(tile.sum[j]) - moved;
        totals.mass[j] += double(tile.mass[j]);
      }
      if constexpr (Loss::sum == Sum::entropy) {
        const double moved = totals.rest[j] == 0 ? 0 : (totals.sum[j] + totals.rest[j] * double(gap)) * double(shrunk);
        totals.sum[j] = moved + double(tile.sum[j]);
      }
      totals.rest[j] = totals.rest[j] * double(shrunk) + double(tile.rest[j]);
      totals.max[j] = tile.max[j];
    }
  }

  void write(const Tile<T>& tile, const Gradients<T>& gradients) {
    grad.open(tile.row, tile.count);
    over_blocks(tile, [&](int64_t first, int64_t columns, const S* from, const P* t) {
      S* base = static_cast<S*>(args.grad);
      S* to = grad.in_place ? grad.in_memory(base, first) : grad.buffer;
      for (int64_t c = 0; c < columns; ++c) {
        write_column(tile, gradients, weight_of(first + c), from + c * logits.stride(),
                     Loss::soft ? t + c * probabilities.stride() : nullptr, to + c * grad.stride());
      }
      if (!Loss::soft) write_targets_of_block(tile, gradients, first, columns, to);
      grad.write(base, first, columns, tile.count);
    });
  }

  void write_column(const Tile<T>& tile, const Gradients<T>& gradients, T weight, const S* from, const P* t, S* to) {
#pragma GCC ivdep
    for (int64_t j = 0; j < tile.count; ++j) {
      const ZAndSlope<T> of = loss.logit(load(from[j]));
      const T gap = of.z - tile.max[j], e = exp(gap);
      T value = gradients.factor[j] * e;
      if constexpr (Loss::sum == Sum::entropy) value += gradients.lean[j] * entropy_term(e, gap);
      if constexpr (Loss::sum == Sum::linear) {
        value -= gradients.share[j] * loss.factor(weight, Loss::soft ? load(t[j]) : T(0));
      }
      if constexpr (decltype(loss.logit)::changes) value *= of.slope;
      to[j] = store<S>(value);
    }
  }

  // What differs from row to row: the target's own gradient, and zero where a row has none, whose logits may be NaN.
  void write_targets_of_block(const Tile<T>& tile, const Gradients<T>& gradients, int64_t first, int64_t columns,
                              S* to) const {
    for (int64_t j = 0; j < tile.count; ++j) {
      const int64_t place = tile.y[j] - first;
      if (place >= 0 && place < columns) to[place * grad.stride() + j] = store<S>(gradients.own[j]);
    }
    for (int64_t j = 0; j < tile.count && !tile.all_active; ++j) {
      if (tile.active[j]) continue;
      for (int64_t c = 0; c < columns; ++c) to[c * grad.stride() + j] = store<S>(T(0));
    }
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
