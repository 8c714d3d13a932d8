// Rows whose classes lie apart, or are few: vectors across the rows of a tile.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kColumns = 16;          // of a block: with kTile rows 16 KB of float, between max and sum
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

template <class S, class P, class Loss>
struct Columns {
  using T = Accumulate<S>;
  using Int = typename Constants<T>::Int;
  const Loss& loss;
  const SoftmaxArgs& args;
  ColumnBlock<S> logits, grad;
  ColumnBlock<P> probabilities;
  alignas(64) T z[kColumns * kTile];

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
    T max[kTile];
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
      for (int64_t j = 0; j < count; ++j) tile.set(j, {totals.max[j], 0, 0, 0});
      for (int64_t c = 0; c < columns; ++c) read_column(tile, Int(first + c), from + c * logits.stride(), c);
      for (int64_t c = 0; c < columns; ++c) {
        add_column(tile, Int(first + c), c, Loss::soft ? t + c * probabilities.stride() : nullptr);
      }
      add_block(tile, totals);
    });
    for (int64_t j = 0; j < count; ++j) {
      tile.set(j, {totals.max[j], T(totals.rest[j]), T(totals.sum[j]), T(totals.mass[j])});
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

  // Moves a column to z, -infinity in place of targets, and raises the tile's max.
  void read_column(Tile<T>& tile, Int index, const S* column, int64_t c) {
    T* to = z + c * kTile;
#pragma GCC ivdep
    for (int64_t j = 0; j < tile.count; ++j) {
      const T value = loss.logit(load(column[j])).z;
      to[j] = Loss::soft ? value : select(tile.y[j] == index, -infinity<T>(), value);
      tile.max[j] = to[j] > tile.max[j] ? to[j] : tile.max[j];
    }
  }

  void add_column(Tile<T>& tile, Int index, int64_t c, const P* t) {
    const T weight = weight_of(index);
    const T* values = z + c * kTile;
#pragma GCC ivdep
    for (int64_t j = 0; j < tile.count; ++j) {
      const T gap = values[j] - tile.max[j], e = exp(gap);
      tile.rest[j] += e;
      if constexpr (Loss::sum == Sum::entropy) tile.sum[j] += entropy_term(e, gap);
      if constexpr (Loss::sum == Sum::linear) {
        const bool is_target = !Loss::soft && tile.y[j] == index;
        const T factor = select(is_target, T(0), loss.factor(weight, Loss::soft ? load(t[j]) : T(0)));
        tile.sum[j] += linear_term(factor, -gap);
        tile.mass[j] += factor;
      }
    }
  }

  void write(const Tile<T>& tile, const Gradients<T>& gradients) {
    grad.open(tile.row, tile.count);
    over_blocks(tile, [&](int64_t first, int64_t columns, const S* from, const P* t) {
      S* base = static_cast<S*>(args.grad);
      S* to = grad.in_place ? grad.in_memory(base, first) : grad.buffer;
      for (int64_t c = 0; c < columns; ++c) {
        write_column(tile, gradients, Int(first + c), from + c * logits.stride(),
                     Loss::soft ? t + c * probabilities.stride() : nullptr, to + c * grad.stride());
      }
      grad.write(base, first, columns, tile.count);
    });
  }

  void write_column(const Tile<T>& tile, const Gradients<T>& gradients, Int index, const S* from, const P* t, S* to) {
    const T weight = weight_of(index);
    const auto at = [&](int64_t j) {
      const ZAndSlope<T> of = loss.logit(load(from[j]));
      const T gap = of.z - tile.max[j], e = exp(gap);
      T value = gradients.factor[j] * e;
      if constexpr (Loss::sum == Sum::entropy) value += gradients.lean[j] * entropy_term(e, gap);
      if constexpr (Loss::sum == Sum::linear) {
        value -= gradients.share[j] * loss.factor(weight, Loss::soft ? load(t[j]) : T(0));
      }
      if constexpr (decltype(loss.logit)::changes) value *= of.slope;
      return Loss::soft ? value : select(tile.y[j] == index, gradients.own[j], value);
    };
    if (tile.all_active) {
#pragma GCC ivdep
      for (int64_t j = 0; j < tile.count; ++j) to[j] = store<S>(at(j));
    } else {
#pragma GCC ivdep
      for (int64_t j = 0; j < tile.count; ++j) {
        to[j] = store<S>(select(tile.active[j] == 0, T(0), at(j)));  // the logits of an ignored row may be NaN
      }
    }
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
