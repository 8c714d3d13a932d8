// Rows whose classes lie side by side: vectors along the classes.
#pragma once

namespace fusedloss::FUSEDLOSS_ISA {

constexpr int64_t kBlock = 4096;  // 16 KB of float: stays in the first-level cache between max and sum
// Shorter rows cost more in tails and lane sums than in logits; the gradient has no sums.
constexpr int64_t kShortestRowForward = 120, kShortestRowBackward = 24;

template <class Loss>
bool by_rows(const SoftmaxArgs& args, int64_t shortest) {
  return args.logits_layout.class_stride == 1 && args.logits_layout.classes >= shortest &&
         (!Loss::soft || args.probabilities_layout.class_stride == 1);
}

// A block of a row as runs of whole lanes of z. The column `hole`, if inside, is left out, and a tail is filled up,
// with -infinity. Float logits that are z themselves are read where they are, but for the 32 around the hole and the
// tail.
template <class S, class Logit>
struct Runs {
  using T = Accumulate<S>;
  static constexpr bool kReadsInPlace = std::is_same_v<S, T> && !Logit::changes;
  struct Run {
    const T* begin;
    int64_t count;
  };
  const Logit& logit;
  Run runs[4];
  int size = 0;
  alignas(64) T buffer[kReadsInPlace ? 2 * kLanes : kBlock + kLanes];

  Runs(const Logit& logit_, const S* logits, int64_t count, int64_t hole) : logit(logit_) {
    const bool has_hole = uint64_t(hole) < uint64_t(count);
    const int64_t whole = count / kLanes * kLanes;
    if constexpr (kReadsInPlace) {
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
    for (int64_t i = 0; i < count; ++i) to[i] = logit(load(logits[i])).z;
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

  T sum_entropy(T max) const {
    T lanes[kLanes] = {};
    for (int r = 0; r < size; ++r) {
      const T* values = runs[r].begin;
      for (int64_t i = 0; i < runs[r].count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const T gap = values[i + lane] - max;
          lanes[lane] += entropy_term(exp(gap), gap);
        }
      }
    }
    return add_lanes(lanes);
  }
};

// Adds k_c (max - z_c) and k_c over columns [begin, end). A lane starts anew every 16 terms: smoothing makes thousands
// of equal ones, which a long chain of additions rounds all the same way.
template <class S, class Loss, class Factors>
void add_linear(const Loss& loss, const S* logits, const Factors& factors, int64_t begin, int64_t end,
                RowStatistics<double>& row) {
  using T = Accumulate<S>;
  constexpr int64_t kSpan = 16 * kLanes;
  const T max = T(row.max);
  T sums[kLanes] = {}, masses[kLanes] = {};
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = least(end, first + kSpan);
    T span_sums[kLanes] = {}, span_masses[kLanes] = {};
    const auto add = [&](int64_t c, int lane) {
      const T factor = factors(c);
      span_sums[lane] += linear_term(factor, max - loss.logit(load(logits[c])).z);
      span_masses[lane] += factor;
    };
    int64_t c = first;
    for (; c + kLanes <= stop; c += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) add(c + lane, lane);
    }
    for (int lane = 0; c + lane < stop; ++lane) add(c + lane, lane);
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += span_sums[lane];
    for (int lane = 0; lane < kLanes; ++lane) masses[lane] += span_masses[lane];
  }
  row.sum += double(add_lanes(sums));
  row.mass += double(add_lanes(masses));
}

// Of columns [begin, end) of a row, without the column `hole`.
template <class S, class P, class Loss>
RowStatistics<double> statistics_of(const Loss& loss, const SoftmaxArgs& args, int64_t row, int64_t begin, int64_t end,
                                    int64_t hole) {
  using T = Accumulate<S>;
  const S* logits = static_cast<const S*>(args.logits) + row_offset(args.logits_layout, row);
  RowStatistics<double> total = {double(lowest<T>()), 0, 0, 0};  // finite: a row of -infinity masks is no inf - inf
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = least(end, block + kBlock);
    const Runs<S, decltype(loss.logit)> runs(loss.logit, logits + block, stop - block, hole - block);
    const double max = double(runs.max());
    if (max > total.max) {
      if (block > begin) total = raised<Loss::sum>(total, max);
      total.max = max;
    }
    total.rest += double(runs.sum_exp(T(total.max)));
    if constexpr (Loss::sum == Sum::entropy) total.sum += double(runs.sum_entropy(T(total.max)));
    if constexpr (Loss::sum == Sum::linear) {
      const bool has_hole = hole >= block && hole < stop;
      with_factors<P, T>(loss, args, row, [&](const auto& factors) {
        add_linear(loss, logits, factors, block, has_hole ? hole : stop, total);
        if (has_hole) add_linear(loss, logits, factors, hole + 1, stop, total);
      });
    }
  }
  return total;
}

template <class T>
RowStatistics<T> rounded(const RowStatistics<double>& row) {
  return {T(row.max), T(row.rest), T(row.sum), T(row.mass)};
}

template <class S, class P, class Loss>
void collect_by_rows(const Loss& loss, Tile<Accumulate<S>>& tile, const SoftmaxArgs& args) {
  using T = Accumulate<S>;
  const int64_t classes = args.logits_layout.classes;
  for (int64_t j = 0; j < tile.count; ++j) {
    if (!tile.active[j]) {
      tile.set(j, {0, 0, 0, 0});
      continue;
    }
    tile.set(j, rounded<T>(statistics_of<S, P>(loss, args, tile.row + j, 0, classes, tile.y[j])));
  }
}

template <class S, class P, class Loss>
SoftmaxPart statistics_of_part(const Loss& loss, const SoftmaxArgs& args, int64_t row, int64_t part) {
  const int64_t begin = part * kSoftmaxPart, end = least(args.logits_layout.classes, begin + kSoftmaxPart);
  const int64_t target = args.target ? target_of(args, row) : -1;
  const int64_t hole = args.target && target != args.ignore_index ? target : -1;
  const auto statistics = statistics_of<S, P>(loss, args, row, begin, end, hole);
  return {statistics.max, statistics.rest, statistics.sum, statistics.mass};
}

template <class Loss, class T>
void merge_parts(Tile<T>& tile, const SoftmaxArgs& args, const SoftmaxPart* parts) {
  const int64_t count = (args.logits_layout.classes + kSoftmaxPart - 1) / kSoftmaxPart;
  for (int64_t j = 0; j < tile.count; ++j) {
    const SoftmaxPart* of_row = parts + (tile.row + j) * count;
    double max = of_row[0].max;
    for (int64_t i = 1; i < count; ++i) max = of_row[i].max > max ? of_row[i].max : max;
    RowStatistics<double> total = {max, 0, 0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const auto part =
          raised<Loss::sum>(RowStatistics<double>{of_row[i].max, of_row[i].rest, of_row[i].sum, of_row[i].mass}, max);
      total.rest += part.rest;
      total.sum += part.sum;
      total.mass += part.mass;
    }
    tile.set(j, rounded<T>(total));
  }
}

// The gradient of classes [begin, end), a row at a time.
template <class S, class P, class Loss, class T>
void write_by_rows(const Loss& loss, const Tile<T>& tile, const SoftmaxArgs& args, const Gradients<T>& gradients,
                   int64_t begin, int64_t end) {
  RowOffsets of_logits(args.logits_layout, tile.row), of_grad(args.grad_layout, tile.row);
  for (int64_t j = 0; j < tile.count; ++j) {
    const S* logits = static_cast<const S*>(args.logits) + of_logits.next();
    S* grad = static_cast<S*>(args.grad) + of_grad.next();
    if (!tile.active[j]) {
      for (int64_t c = begin; c < end; ++c) grad[c] = store<S>(T(0));
      continue;
    }
    const T factor = gradients.factor[j], max = tile.max[j], lean = gradients.lean[j], share = gradients.share[j];
    with_factors<P, T>(loss, args, tile.row + j, [&](const auto& factors) {
#pragma GCC ivdep
      for (int64_t c = begin; c < end; ++c) {
        const ZAndSlope<T> z = loss.logit(load(logits[c]));
        const T gap = z.z - max, e = exp(gap);
        T value = factor * e;
        if constexpr (Loss::sum == Sum::entropy) value += lean * entropy_term(e, gap);
        if constexpr (Loss::sum == Sum::linear) value -= share * factors(c);
        grad[c] = store<S>(decltype(loss.logit)::changes ? value * z.slope : value);
      }
    });
    const int64_t target = tile.y[j];
    if (target >= begin && target < end) grad[target] = store<S>(gradients.own[j]);
  }
}

// Of a loss of the target's logit alone: zero elsewhere.
template <class S, class Loss, class T>
void write_targets(const Loss& loss, const Tile<T>& tile, const SoftmaxArgs& args) {
  const SoftmaxLayout& layout = args.grad_layout;
  RowOffsets offsets(layout, tile.row);
  for (int64_t j = 0; j < tile.count; ++j) {
    S* grad = static_cast<S*>(args.grad) + offsets.next();
    for (int64_t c = 0; c < layout.classes; ++c) grad[c * layout.class_stride] = store<S>(T(0));
    if (tile.y[j] < 0) continue;
    const T upstream = upstream_of<S>(args.upstream, args.upstream_stride, args.wide, tile.row + j, T(1));
    grad[tile.y[j] * layout.class_stride] = store<S>(loss.gradient(tile.weight[j], T(double(upstream) * args.scale)));
  }
}

}  // namespace fusedloss::FUSEDLOSS_ISA
