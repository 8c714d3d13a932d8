// Rows whose classes lie side by side: vectors along the classes.
#pragma once

#include "softmax_groups.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// Shorter rows cost more in tails and lane sums than in logits; the gradient has no sums.
constexpr int64_t kShortestRowForward = 120, kShortestRowBackward = 24;
static_assert(kShortestRowForward >= kLanes, "a row fills a group");

template <class Loss>
bool by_rows(const SoftmaxArgs& args, int64_t shortest) {
  return args.logits_layout.class_stride == 1 && args.logits_layout.classes >= shortest &&
         (!Loss::soft || args.probabilities_layout.class_stride == 1);
}

// Adds k_c (max - z_c) and k_c over columns [begin, end).
template <class S, class Loss, class Factors>
void add_linear(const Loss& loss, const S* logits, const Factors& factors, int64_t begin, int64_t end,
                RowStatistics<double>& row) {
  using T = Accumulate<S>;
  const T max = T(row.max);
  T sums[kLanes] = {}, masses[kLanes] = {}, lost[kLanes] = {};
  const auto add = [&](int64_t c, int lane) {
    const T factor = factors(c);
    sums[lane] += linear_term(factor, max - loss.logit(load(logits[c])).z);
    add_with_loss(factor, masses[lane], lost[lane]);
  };
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(c + lane, lane);
  }
  for (int lane = 0; c + lane < end; ++lane) add(c + lane, lane);
  row.sum += double(add_lanes(sums));
  T mass = add_lanes(masses);
  if (mass != mass) {  // of an infinite factor infinity was lost
    mass = 0;
    for (int64_t k = begin; k < end; ++k) mass += factors(k);
  }
  row.mass += double(mass);
}

// The exponentials of a row, each relative to the max known when its block was read.
template <class S>
struct Kept {
  using T = Accumulate<S>;
  T* exponentials = nullptr;  // [classes]; null where they are not wanted
  T* max_of_block = nullptr;
  S* grad = nullptr;  // where the row's gradient will be written
};

// The statistics of columns [begin, end) of a row, without `skipped_column`.
template <class S, class P, class Loss>
RowStatistics<double> statistics_of(const Loss& loss, const SoftmaxArgs& args, int64_t row, int64_t begin, int64_t end,
                                    int64_t skipped_column, Kept<S> kept = {}) {
  using T = Accumulate<S>;
  const S* logits = static_cast<const S*>(args.logits) + row_offset(args.logits_layout, row);
  RowStatistics<double> total = {double(lowest<T>()), 0, 0, 0};  // finite: a row of -infinity masks is no inf - inf
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = least(end, block + kBlock);
    const Groups<S, decltype(loss.logit)> groups(loss.logit, logits + block, stop - block, skipped_column - block);
    const double max = double(groups.max);
    if (max > total.max) {
      if (block > begin) total = raised<typename Loss::Sum>(total, max);
      total.max = max;
    }
    if (kept.exponentials) {
      total.sum_without_target +=
          double(groups.sum_kept(T(total.max), stop - block, kept.exponentials + block, kept.grad + block));
      kept.max_of_block[block / kBlock] = T(total.max);
    } else {
      total.sum_without_target += double(groups.sum(T(total.max), [](T gap) { return exp(gap); }));
    }
    if constexpr (Loss::Sum::has_entropy) {
      total.sum += double(groups.sum(T(total.max), [](T gap) { return entropy_term(exp(gap), gap); }));
    }
    if constexpr (Loss::Sum::has_factors) {
      const bool skips = skipped_column >= block && skipped_column < stop;
      with_factors<P, T>(loss, args, row, [&](const auto& factors) {
        add_linear(loss, logits, factors, block, skips ? skipped_column : stop, total);
        if (skips) add_linear(loss, logits, factors, skipped_column + 1, stop, total);
      });
    }
  }
  return total;
}

template <class T>
RowStatistics<T> rounded(const RowStatistics<double>& row) {
  return {T(row.max), T(row.sum_without_target), T(row.sum), T(row.mass)};
}

template <class S, class P, class Loss>
void collect_by_rows(const Loss& loss, Tile<Accumulate<S>>& tile, const SoftmaxArgs& args) {
  using T = Accumulate<S>;
  const int64_t classes = args.logits_layout.classes;
  for (int64_t j = 0; j < tile.count; ++j) {
    if (!tile.active(j)) {
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
  const auto* sample_weights = static_cast<const Accumulate<S>*>(args.sample_weight);
  const bool ignored = target == args.ignore_index || (sample_weights && sample_weights[row] == 0);
  const int64_t skipped_column = args.target && !ignored ? target : -1;
  const auto statistics = statistics_of<S, P>(loss, args, row, begin, end, skipped_column);
  return {statistics.max, statistics.sum_without_target, statistics.sum, statistics.mass};
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
      const auto part = raised<typename Loss::Sum>(
          RowStatistics<double>{of_row[i].max, of_row[i].sum_without_target, of_row[i].sum, of_row[i].mass}, max);
      total.sum_without_target += part.sum_without_target;
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
    if (!tile.active(j)) {
      for (int64_t c = begin; c < end; ++c) grad[c] = store<S>(T(0));
      continue;
    }
    const T max = tile.max[j];
    const ColumnCoefficients<T> coefficients = gradients.of_columns(j);
    with_factors<P, T>(loss, args, tile.row + j, [&](const auto& factors) {
      const auto gradient_of = [&](int64_t c, T logit) {
        const ZAndSlope<T> z = loss.logit(logit);
        const T gap = z.z - max, e = exp(gap);
        const T value = column_gradient<typename Loss::Sum>(coefficients, Column<T>{e, gap, factors(c)});
        return decltype(loss.logit)::changes ? value * z.slope : value;
      };
      int64_t c = begin;
      for (; !std::is_same_v<S, T> && c + kLanes <= end; c += kLanes) {
        T lanes[kLanes];
        Group<S>::read(logits + c, lanes);
#pragma GCC ivdep
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = gradient_of(c + Group<S>::column_of(lane), lanes[lane]);
        }
        Group<S>::write(lanes, grad + c);
      }
#pragma GCC ivdep
      for (; c < end; ++c) grad[c] = store<S>(gradient_of(c, load(logits[c])));
    });
    const int64_t target = tile.y[j];
    if (target >= begin && target < end) grad[target] = store<S>(gradients.own[j]);
  }
}

}  // namespace fusedloss::FUSEDLOSS_ISA
