// The pass that reads the logits once and leaves losses and statistics; included once per instruction set.

#include "softmax.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// Losses and statistics of a tile whose statistics are collected; returns its sums.
template <class S, class Loss>
SoftmaxSums finish(const Loss& loss, Tile<Accumulate<S>>& tile, const SoftmaxArgs& args) {
  using T = Accumulate<S>;
  T losses[kTile], second[kTile], loss_lanes[kLanes] = {}, weight_lanes[kLanes] = {};
  const T all_active = T(tile.all_active);
  for (int64_t j = 0; j < tile.padded; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = j + lane;
      T value;
      if constexpr (Loss::reads_row) {
        const T factor = Loss::sum == Sum::linear && !Loss::soft ? tile.weight[i] : T(0);
        const Row<T> row = complete<Loss::sum>(tile.statistics(i), tile.logit[i], factor);
        value = loss.value(row, tile.weight[i]);
        second[i] = select(tile.counts[i] + all_active == T(0), T(0), loss.second(row));
      } else {
        value = loss.value(tile.logit[i], tile.weight[i]);
      }
      const bool ignored = tile.counts[i] == T(0);
      losses[i] = select(ignored, T(0), value);
      loss_lanes[lane] += losses[i];
      weight_lanes[lane] += Loss::mean_by_weight ? tile.counts[i] * tile.weight[i] : tile.counts[i];
    }
  }
  if (args.losses) store_results<S>(args.losses, args.wide, tile.row, losses, tile.count);
  if constexpr (Loss::reads_row) {
    if (args.second) store_results<S>(args.second, args.wide, tile.row, second, tile.count);
    T* saved = static_cast<T*>(args.statistics) + tile.row;
    const int64_t rows = args.logits_layout.rows;
    for (int64_t j = 0; j < tile.count; ++j) saved[j] = tile.max[j];
    for (int64_t j = 0; j < tile.count; ++j) saved[rows + j] = tile.rest[j];
    if constexpr (Loss::sum != Sum::none) {
      const T* third = Loss::sum == Sum::linear ? tile.mass : tile.sum;
      for (int64_t j = 0; j < tile.count; ++j) saved[2 * rows + j] = third[j];
    }
  }
  return {double(add_lanes(loss_lanes)), double(add_lanes(weight_lanes)), -1};
}

template <class S, class P, class Loss>
SoftmaxSums forward(const Loss& loss, const SoftmaxArgs& args, const SoftmaxPart* parts, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const bool rows = parts || by_rows<Loss>(args, kShortestRowForward);
  SoftmaxSums sums = {0, 0, -1};
  Tile<T> tile;
  Columns<S, P, Loss> columns(loss, args);
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, rows ? kTile : columns.rows_left(first));
    tile.open(args, first, stop, args.second && Loss::second_of_ignored);
    if (rows || !Loss::reads_row) tile.template read_logits<S>(loss, args);
    if constexpr (Loss::reads_row) {
      if (parts) {
        merge_parts<Loss>(tile, args, parts);
      } else {
        rows ? collect_by_rows<S, P>(loss, tile, args) : columns.collect(tile);
      }
    }
    const SoftmaxSums part = finish<S>(loss, tile, args);
    sums.loss += part.loss;
    sums.weight += part.weight;
  }
  return sums;
}

// A tile's worth of comparisons at a time, without a branch in between.
template <class T, class Index>
SoftmaxSums sums_of_targets(const Index* target, const SoftmaxArgs& args, const T* weight, int64_t begin, int64_t end) {
  const auto counts = [&](int64_t row) { return int64_t(int64_t(target[row]) != args.ignore_index); };
  const auto is_bad = [&](int64_t row) {
    return counts(row) & int64_t(uint64_t(target[row]) >= uint64_t(args.logits_layout.classes));
  };
  SoftmaxSums sums = {0, 0, -1};
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t stop = least(end, first + kTile);
    int64_t counted = 0, bad = 0;
    for (int64_t row = first; row < stop; ++row) {
      counted += counts(row);
      bad += is_bad(row);
    }
    for (int64_t row = first; row < stop && bad; ++row) {
      if (is_bad(row)) return {0, 0, row};
    }
    double lanes[kLanes] = {};
    for (int64_t row = first; row < stop && weight; ++row) {
      if (counts(row)) lanes[(row - first) % kLanes] += double(weight[target[row]]);
    }
    sums.weight += weight ? add_lanes(lanes) : double(counted);
  }
  return sums;
}

SoftmaxSums softmax_targets(const SoftmaxArgs& args, bool by_weight, int64_t begin, int64_t end) {
  if (!args.target) return {0, double(end - begin), -1};
  const void* weight = by_weight ? args.weight : nullptr;
  return with_targets(args, [&](const auto* target) {
    return args.dtype == DType::Double ? sums_of_targets(target, args, static_cast<const double*>(weight), begin, end)
                                       : sums_of_targets(target, args, static_cast<const float*>(weight), begin, end);
  });
}

SoftmaxSums softmax_forward(Softmax loss, const SoftmaxArgs& args, const SoftmaxPart* parts, int64_t begin,
                            int64_t end) {
  const SoftmaxSums of_targets = softmax_targets(args, false, begin, end);
  if (of_targets.bad_row >= 0) return of_targets;
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) {
    return forward<decltype(storage), decltype(probability)>(functor, args, parts, begin, end);
  });
}

SoftmaxPart softmax_part(Softmax loss, const SoftmaxArgs& args, int64_t row, int64_t part) {
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) -> SoftmaxPart {
    if constexpr (std::decay_t<decltype(functor)>::reads_row) {
      return statistics_of_part<decltype(storage), decltype(probability)>(functor, args, row, part);
    }
    return {};
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
