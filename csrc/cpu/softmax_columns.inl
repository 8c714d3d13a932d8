// Rows whose classes lie apart, or are few: vectors across the rows of a tile.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int kColumns = 32;          // of a block: with kTile rows 32 KB of float, between max and sum
constexpr int64_t kFewColumns = 4;    // that are searched for the rows' targets sooner than each row finds its own
constexpr int64_t kShortestRun = 32;  // rows side by side in memory, worth reading as vectors in place

// Columns [first, first + columns) of a tile, moved between memory and vectors across its rows, kTile apart.
template <class S>
struct ColumnBlock {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout;
  const bool side_by_side;  // the rows, in memory: vectors across them are there already
  int64_t offset[kTile];

  explicit ColumnBlock(const SoftmaxLayout& l)
      : layout(l), side_by_side(l.inner_stride == 1 && l.inner >= kShortestRun) {}

  void open(int64_t row, int64_t count) {
    RowOffsets offsets(layout, row);
    for (int64_t first = 0; first < (side_by_side ? 1 : count);) {
      const auto run = offsets.next(count - first);
      for (int64_t j = 0; j < run.count; ++j) offset[first + j] = run.offset + j * layout.inner_stride;
      first += run.count;
    }
  }
  // How many rows from this one on may share a tile: side by side, those of its run.
  int64_t rows_left(int64_t row) const {
    return side_by_side ? least(kTile, layout.inner - row % layout.inner) : kTile;
  }
  template <class Pointer>
  Pointer column(Pointer base, int64_t c) const {
    return base + offset[0] + c * layout.class_stride;
  }

  void read(const S* base, int64_t first, int64_t columns, int64_t count, T* to) const {
    if (side_by_side) {
      for (int64_t c = 0; c < columns; ++c) {
        const S* from = column(base, first + c);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) to[c * kTile + j] = load(from[j]);
      }
      return;
    }
    const int64_t by_four = layout.class_stride == 1 && columns >= 4 ? count / 4 * 4 : 0;
    for (int64_t j = 0; j < by_four; j += 4) read_four(base + first, columns, j, to + j);
    for (int64_t j = by_four; j < count; ++j) {
      const S* row = base + offset[j] + first * layout.class_stride;
      for (int64_t c = 0; c < columns; ++c) to[c * kTile + j] = load(row[c * layout.class_stride]);
    }
  }

  void write(S* base, int64_t first, int64_t columns, int64_t count, const T* from) const {
    if (side_by_side) {
      for (int64_t c = 0; c < columns; ++c) {
        S* to = column(base, first + c);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) to[j] = store<S>(from[c * kTile + j]);
      }
      return;
    }
    const int64_t by_four = layout.class_stride == 1 && columns >= 4 ? count / 4 * 4 : 0;
    for (int64_t j = 0; j < by_four; j += 4) write_four(base + first, columns, j, from + j);
    for (int64_t j = by_four; j < count; ++j) {
      S* row = base + offset[j] + first * layout.class_stride;
      for (int64_t c = 0; c < columns; ++c) row[c * layout.class_stride] = store<S>(from[c * kTile + j]);
    }
  }

 private:
  // Four rows whose classes lie side by side, by squares of four, the last of which may overlap another.
  void read_four(const S* base, int64_t columns, int64_t j, T* to) const {
    const T* rows[4];
    T converted[4][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const S* row = base + offset[j + r];
      if constexpr (std::is_same_v<S, T>) {
        rows[r] = row;
      } else {
        for (int64_t c = 0; c < columns; ++c) converted[r][c] = load(row[c]);
        rows[r] = converted[r];
      }
    }
    for (int64_t c = 0; c < columns; c += 4) {
      const int64_t at = least(c, columns - 4);
      T* lines = to + at * kTile;
      transpose<T>({rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at},
                   {lines, lines + kTile, lines + 2 * kTile, lines + 3 * kTile});
    }
  }

  void write_four(S* base, int64_t columns, int64_t j, const T* from) const {
    T* rows[4];
    T converted[4][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if constexpr (std::is_same_v<S, T>) {
        rows[r] = base + offset[j + r];
      } else {
        rows[r] = converted[r];
      }
    }
    for (int64_t c = 0; c < columns; c += 4) {
      const int64_t at = least(c, columns - 4);
      const T* lines = from + at * kTile;
      transpose<T>({lines, lines + kTile, lines + 2 * kTile, lines + 3 * kTile},
                   {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at});
    }
    for (int r = 0; r < 4 && !std::is_same_v<S, T>; ++r) {
      S* row = base + offset[j + r];
      for (int64_t c = 0; c < columns; ++c) row[c] = store<S>(converted[r][c]);
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
  // One block. The rows that fill a tile's last vectors are computed too, but never written.
  alignas(64) T z[kColumns * kTile];
  alignas(64) T t[Loss::soft ? kColumns * kTile : 1];
  alignas(64) S streamed[kColumns * kTile];

  Columns(const Loss& loss_, const SoftmaxArgs& args_)
      : loss(loss_),
        args(args_),
        logits(args_.logits_layout),
        grad(args_.grad ? args_.grad_layout : args_.logits_layout),
        probabilities(Loss::soft ? args_.probabilities_layout : args_.logits_layout) {}

  int64_t rows_left(int64_t row) const {
    return least(logits.rows_left(row), least(grad.rows_left(row), probabilities.rows_left(row)));
  }

  // Calls f(first column, columns) for one block after the other, whose probabilities are in t.
  template <class F>
  void over_blocks(const Tile<T>& tile, F f) {
    logits.open(tile.row, tile.count);
    if (Loss::soft) probabilities.open(tile.row, tile.count);
    const int64_t classes = args.logits_layout.classes;
    for (int64_t first = 0; first < classes; first += kColumns) {
      const int64_t columns = least(kColumns, classes - first);
      if (Loss::soft) {
        probabilities.read(static_cast<const P*>(args.probabilities), first, columns, tile.count, t);
        fill(tile, columns, t);
      }
      f(first, columns);
    }
  }

  // Here, and not once for the whole block: 32 KB take longer than a loss of a few rows.
  static void fill(const Tile<T>& tile, int64_t columns, T* block) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t j = tile.count; j < tile.padded; ++j) block[c * kTile + j] = T(0);
    }
  }

  T weight_of(int64_t c) const {
    return args.weight && !Loss::Sum::even ? static_cast<const T*>(args.weight)[c] : T(1);
  }

  // Sums in T within a block and in double across blocks: there may be a hundred thousand classes.
  struct Totals {
    T max[kTile];
    double sum_without_target[kTile], sum[kTile], mass[kTile];
  };

  // With kKeep the exponentials take the place of z; there must be one block only.
  template <bool kKeep = false>
  void collect(Tile<T>& tile) {
    const bool one_block = args.logits_layout.classes <= kColumns;
    Totals totals;
    for (int64_t j = 0; j < tile.padded; ++j) {
      tile.max[j] = lowest<T>();  // finite: a row of -infinity masks is no inf - inf
      tile.logit[j] = -infinity<T>();
    }
    over_blocks(tile, [&](int64_t first, int64_t columns) {
      logits.read(static_cast<const S*>(args.logits), first, columns, tile.count, z);
      fill(tile, columns, z);
      for (int64_t c = 0; c < columns && decltype(loss.logit)::changes; ++c) {
        for (int64_t j = 0; j < tile.padded; ++j) z[c * kTile + j] = loss.logit(z[c * kTile + j]).z;
      }
      if (!Loss::soft) take_targets(tile, first, columns);
      for (int64_t j = 0; j < tile.count; j += kLanes) {
        if (logits.side_by_side) prefetch(tile.count + j, first, columns);
        add_lanes_of_block<kKeep>(tile, first, columns, j);
      }
      if (!one_block) first == 0 ? set_block(tile, totals) : add_block(tile, totals);
    });
    for (int64_t j = 0; j < tile.count && !one_block; ++j) {
      tile.set(j, {totals.max[j], T(totals.sum_without_target[j]), T(totals.sum[j]), T(totals.mass[j])});
    }
  }

  // Moves the targets' logits from the block to the tile, and leaves -infinity.
  void take_targets(Tile<T>& tile, int64_t first, int64_t columns) {
    if (columns <= kFewColumns) {
      for (int64_t c = 0; c < columns; ++c) {
        T* values = z + c * kTile;
        for (int64_t j = 0; j < tile.padded; ++j) {
          const bool taken = tile.y[j] == Int(first + c);
          tile.logit[j] = select(taken, values[j], tile.logit[j]);
          values[j] = select(taken, -infinity<T>(), values[j]);
        }
      }
    } else {
      for (int64_t j = 0; j < tile.count; ++j) {
        const int64_t place = tile.y[j] - first;
        if (place < 0 || place >= columns) continue;
        tile.logit[j] = z[place * kTile + j];
        z[place * kTile + j] = -infinity<T>();
      }
    }
  }

  // Statistics of a block for the rows [j, j + kLanes), whose numbers stay in registers from column to column.
  template <bool kKeep>
  void add_lanes_of_block(Tile<T>& tile, int64_t first, int64_t columns, int64_t j) {
    T max[kLanes], sum_without_target[kLanes] = {}, sum[kLanes] = {}, mass[kLanes] = {}, lost[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) max[lane] = tile.max[j + lane];
    for (int64_t c = 0; c < columns; ++c) {
      const T* values = z + c * kTile + j;
      for (int lane = 0; lane < kLanes; ++lane) max[lane] = values[lane] > max[lane] ? values[lane] : max[lane];
    }
    for (int64_t c = 0; c < columns; ++c) {
      T* values = z + c * kTile + j;
      [[maybe_unused]] const T* probability = Loss::soft ? t + c * kTile + j : nullptr;
      [[maybe_unused]] const auto index = Int(first + c);
      [[maybe_unused]] const T weight = weight_of(index);
      for (int lane = 0; lane < kLanes; ++lane) {
        const T gap = values[lane] - max[lane], e = exp(gap);
        sum_without_target[lane] += e;
        if constexpr (kKeep) values[lane] = e;
        T factor = 0;
        if constexpr (Loss::Sum::has_factors) {
          factor =
              Loss::soft ? loss.factor(weight, probability[lane]) : select(tile.y[j + lane] == index, T(0), weight);
          add_with_loss(factor, mass[lane], lost[lane]);
        }
        Loss::Sum::add(sum[lane], Column<T>{e, gap, factor});
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (Loss::Sum::has_factors && mass[lane] != mass[lane]) mass[lane] = mass_of(tile, first, columns, j + lane);
      tile.set(j + lane, {max[lane], sum_without_target[lane], sum[lane], mass[lane]});
    }
  }

  // The factors of a row of the block added up as they are: with an infinite one add_with_loss loses infinity.
  T mass_of(const Tile<T>& tile, int64_t first, int64_t columns, int64_t j) const {
    T mass = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const T weight = weight_of(first + c);
      mass += Loss::soft ? loss.factor(weight, t[c * kTile + j]) : tile.y[j] == first + c ? T(0) : weight;
    }
    return mass;
  }

  // The next tile's lines on their way while this one is worked on: its runs are too short for the hardware to see.
  void prefetch(int64_t row, int64_t first, int64_t columns) const {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (int64_t c = 0; c < columns; ++c) {
      const S* from = logits.column(static_cast<const S*>(args.logits), first + c) + row;
      for (int64_t i = 0; i < kLanes; i += kLine) __builtin_prefetch(from + i);
    }
  }

  void set_block(const Tile<T>& tile, Totals& totals) {
    for (int64_t j = 0; j < tile.count; ++j) {
      totals.max[j] = tile.max[j];
      totals.sum_without_target[j] = double(tile.sum_without_target[j]);
      if constexpr (Loss::Sum::has_sum) totals.sum[j] = double(tile.sum[j]);
      if constexpr (Loss::Sum::has_factors) totals.mass[j] = double(tile.mass[j]);
    }
  }

  // What Sum::raise does, as ?: instead of select, which in double between floats would be no vector code in SSE2.
  void add_block(const Tile<T>& tile, Totals& totals) {
    for (int64_t j = 0; j < tile.count; ++j) {
      const T gap = totals.max[j] - tile.max[j], shrunk = exp(gap);
      if constexpr (Loss::Sum::has_factors) {
        const double moved = totals.mass[j] == 0 || gap == 0 ? 0 : totals.mass[j] * double(gap);
        totals.sum[j] += double(tile.sum[j]) - moved;
        totals.mass[j] += double(tile.mass[j]);
      }
      if constexpr (Loss::Sum::has_entropy) {
        const double moved = totals.sum_without_target[j] == 0
                                 ? 0
                                 : (totals.sum[j] + totals.sum_without_target[j] * double(gap)) * double(shrunk);
        totals.sum[j] = moved + double(tile.sum[j]);
      }
      totals.sum_without_target[j] = totals.sum_without_target[j] * double(shrunk) + double(tile.sum_without_target[j]);
      totals.max[j] = tile.max[j];
    }
  }

  void write(const Tile<T>& tile, const Gradients<T>& gradients) {
    const S* from = static_cast<const S*>(args.logits);
    S* to = static_cast<S*>(args.grad);
    grad.open(tile.row, tile.count);
    over_blocks(tile, [&](int64_t first, int64_t columns) {
      if (!logits.side_by_side || !grad.side_by_side) {
        logits.read(from, first, columns, tile.count, z);
        write_block(tile, gradients, first, columns, z, kTile, z, kTile);
        return grad.write(to, first, columns, tile.count, z);
      }
      const S* read = logits.column(from, first);
      const int64_t stride = args.logits_layout.class_stride, grad_stride = args.grad_layout.class_stride;
      S* written = grad.column(to, first);
      if (!args.streams) return write_block(tile, gradients, first, columns, read, stride, written, grad_stride);
      write_block(tile, gradients, first, columns, read, stride, streamed, kTile);
      for (int64_t c = 0; c < columns; ++c) stream(written + c * grad_stride, streamed + c * kTile, tile.count);
    });
  }

  // Writes the gradient from the exponentials kept in z.
  void write_kept(const Tile<T>& tile, const Gradients<T>& gradients) {
    const int64_t columns = args.logits_layout.classes;
    for (int64_t c = 0; c < columns; ++c) {
      T* values = z + c * kTile;
      [[maybe_unused]] const T weight = weight_of(c);
      for (int64_t j = 0; j < tile.padded; ++j) {
        const T factor = loss.factor(weight, Loss::soft ? t[c * kTile + j] : T(0));
        values[j] = column_gradient<typename Loss::Sum>(gradients.of_columns(j), Column<T>{values[j], T(0), factor});
      }
    }
    write_targets(tile, gradients, 0, columns, z, kTile);
    S* to = static_cast<S*>(args.grad);
    grad.open(tile.row, tile.count);
    if (!grad.side_by_side || !args.streams) return grad.write(to, 0, columns, tile.count, z);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t j = 0; j < tile.count; ++j) streamed[j] = store<S>(z[c * kTile + j]);
      stream(grad.column(to, c), streamed, tile.count);
    }
  }

  template <class V>
  void write_block(const Tile<T>& tile, const Gradients<T>& gradients, int64_t first, int64_t columns, const V* from,
                   int64_t from_stride, V* to, int64_t to_stride) {
    for (int64_t c = 0; c < columns; ++c) {
      write_column(tile, gradients, weight_of(first + c), from + c * from_stride, t + (Loss::soft ? c * kTile : 0),
                   to + c * to_stride);
    }
    write_targets(tile, gradients, first, columns, to, to_stride);
  }

  // What differs from row to row: the target's own gradient, and zero where a row has none, whose logits may be NaN.
  template <class V>
  void write_targets(const Tile<T>& tile, const Gradients<T>& gradients, int64_t first, int64_t columns, V* to,
                     int64_t to_stride) {
    if constexpr (!Loss::soft) {
      if (std::is_same_v<V, T> && columns <= kFewColumns) {
        for (int64_t c = 0; c < columns; ++c) {
          V* column = to + c * to_stride;
#pragma GCC ivdep
          for (int64_t j = 0; j < tile.count; ++j) {
            column[j] = tile.y[j] == Int(first + c) ? store<V>(gradients.own[j]) : column[j];
          }
        }
      } else {
        for (int64_t j = 0; j < tile.count; ++j) {
          const int64_t place = tile.y[j] - first;
          if (place >= 0 && place < columns) to[place * to_stride + j] = store<V>(gradients.own[j]);
        }
      }
    }
    if (tile.all_active) return;
    for (int64_t j = 0; j < tile.count; ++j) {
      if (tile.active(j)) continue;
      for (int64_t c = 0; c < columns; ++c) to[c * to_stride + j] = store<V>(T(0));
    }
  }

  template <class V>
  void write_column(const Tile<T>& tile, const Gradients<T>& gradients, T weight, const V* from, const T* probability,
                    V* to) {
#pragma GCC ivdep
    for (int64_t j = 0; j < tile.count; ++j) {
      const ZAndSlope<T> logit = loss.logit(load(from[j]));
      const T gap = logit.z - tile.max[j], e = exp(gap);
      const T factor = loss.factor(weight, Loss::soft ? probability[j] : T(0));
      T value = column_gradient<typename Loss::Sum>(gradients.of_columns(j), Column<T>{e, gap, factor});
      if constexpr (decltype(loss.logit)::changes) value *= logit.slope;
      to[j] = store<V>(value);
    }
  }
};

}  // namespace fusedloss::FUSEDLOSS_ISA
