// The pass that reads the logits once and leaves losses and statistics; included once per instruction set.

#include "softmax.inl"
#include "softmax_targets.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// Rows whose classes lie side by side.
template <class S, class P, class Loss>
SoftmaxSums forward_by_rows(const Loss& loss, const SoftmaxArgs& args, const SoftmaxPart* parts, int64_t begin,
                            int64_t end) {
  SoftmaxSums sums = {0, 0, -1};
  Tile<Accumulate<S>> tile;
  for (int64_t first = begin; first < end; first += kTile) {
    tile.open(args, first, least(end, first + kTile), args.second && Loss::second_of_ignored);
    tile.template read_logits<S>(loss, args);
    parts ? merge_parts<Loss>(tile, args, parts) : collect_by_rows<S, P>(loss, tile, args);
    add(sums, finish(loss, tile, args));
  }
  return sums;
}

template <class S, class P, class Loss>
SoftmaxSums forward_by_columns(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  SoftmaxSums sums = {0, 0, -1};
  Tile<Accumulate<S>> tile;
  Columns<S, P, Loss> columns(loss, args);
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, columns.rows_left(first));
    tile.open(args, first, stop, args.second && Loss::second_of_ignored);
    columns.collect(tile);
    add(sums, finish(loss, tile, args));
  }
  return sums;
}

template <class S, class P, class Loss>
SoftmaxSums forward(const Loss& loss, const SoftmaxArgs& args, const SoftmaxPart* parts, int64_t begin, int64_t end) {
  if constexpr (!Loss::reads_row) {
    return forward_of_targets<S>(loss, args, begin, end);
  } else if (!parts && !by_rows<Loss>(args, kShortestRowForward)) {
    return forward_by_columns<S, P>(loss, args, begin, end);
  } else {
    return forward_by_rows<S, P>(loss, args, parts, begin, end);
  }
}

// What the rows that count add to the divisor of a mean: the product of their weights. A factor that is null is 1.
template <class T, class Counts, class OfTarget>
double sum_of_weights(const T* sample_weights, int64_t first, int64_t stop, Counts counts, OfTarget weight_of_target) {
  double lanes[kLanes] = {};
  for (int64_t row = first; row < stop; ++row) {
    const double of_row = sample_weights ? double(sample_weights[row]) : 1;
    if (counts(row) && of_row != 0) lanes[(row - first) % kLanes] += of_row * weight_of_target(row);
  }
  return add_lanes(lanes);
}

// A tile's worth of comparisons at a time, without a branch in between.
template <class T, class Index>
SoftmaxSums sums_of_targets(const Index* target, const SoftmaxArgs& args, bool by_weight, int64_t begin, int64_t end) {
  const T* weight = by_weight ? static_cast<const T*>(args.weight) : nullptr;
  const T* sample_weights = static_cast<const T*>(args.sample_weight);
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
    const auto of_target = [&](int64_t row) { return weight ? double(weight[target[row]]) : 1.0; };
    sums.weight +=
        weight || sample_weights ? sum_of_weights(sample_weights, first, stop, counts, of_target) : double(counted);
  }
  return sums;
}

template <class T>
SoftmaxSums sums_of_targets(const SoftmaxArgs& args, bool by_weight, int64_t begin, int64_t end) {
  if (args.target) {
    return with_targets(args,
                        [&](const auto* target) { return sums_of_targets<T>(target, args, by_weight, begin, end); });
  }
  const T* sample_weights = static_cast<const T*>(args.sample_weight);
  if (!sample_weights) return {0, double(end - begin), -1};
  const auto one = [](int64_t) { return 1.0; };
  return {0, sum_of_weights(sample_weights, begin, end, one, one), -1};
}

SoftmaxSums softmax_targets(const SoftmaxArgs& args, bool by_weight, int64_t begin, int64_t end) {
  return args.dtype == DType::Double ? sums_of_targets<double>(args, by_weight, begin, end)
                                     : sums_of_targets<float>(args, by_weight, begin, end);
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
