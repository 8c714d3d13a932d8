// A loss that reads only the target's logit: nothing is done for all classes of a row but to clear its gradient.
#pragma once

#include "softmax_tile.inl"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T, bool kWeighted, class Index, class F>
void for_each_target(const SoftmaxArgs& args, const SoftmaxLayout& layout, const Index* target, int64_t begin,
                     int64_t end, F f) {
  const T* weights = static_cast<const T*>(args.weight);
  const T* sample_weights = static_cast<const T*>(args.sample_weight);
  const int64_t ignore_index = args.ignore_index, class_stride = layout.class_stride;
  RowOffsets offsets(layout, begin);
  for (int64_t row = begin; row < end;) {
    auto [offset, rows] = offsets.next(end - row);
    for (const int64_t stop = row + rows; row < stop; ++row, offset += layout.inner_stride) {
      const int64_t c = target[row];
      if (c == ignore_index) continue;
      const T counts = kWeighted && sample_weights ? sample_weights[row] : T(1);
      if (kWeighted && counts == T(0)) continue;
      f(row, offset + c * class_stride, kWeighted && weights ? weights[c] : T(1), counts);
    }
  }
}

// Calls f(row, offset of the target's number, the target's weight, the row's sample weight) on the rows that count.
template <class T, class F>
void for_each_target(const SoftmaxArgs& args, const SoftmaxLayout& layout, int64_t begin, int64_t end, F f) {
  with_targets(args, [&](const auto* target) {
    if (args.weight || args.sample_weight) return for_each_target<T, true>(args, layout, target, begin, end, f);
    for_each_target<T, false>(args, layout, target, begin, end, f);
  });
}

// Summed in double, in lanes that do not wait for each other.
template <class S, class Loss>
SoftmaxSums forward_of_targets(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const S* logits = static_cast<const S*>(args.logits);
  double loss_lanes[4] = {}, weight_lanes[4] = {};
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t stop = least(end, first + kTile);
    T losses[kTile];
    if (args.losses) std::memset(losses, 0, size_t(stop - first) * sizeof(T));
    for_each_target<T>(args, args.logits_layout, first, stop, [&](int64_t row, int64_t offset, T weight, T counts) {
      const size_t j = size_t(row - first);
      losses[j] = counts * loss.value(loss.logit(T(load(logits[offset]))).z, weight);
      loss_lanes[j % 4] += double(losses[j]);
      weight_lanes[j % 4] += double(counts * weight_in_mean<Loss>(weight));
    });
    if (args.losses) store_results(args, args.losses, first, losses, stop - first);
  }
  const auto sum = [](const double(&lanes)[4]) { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); };
  return {sum(loss_lanes), sum(weight_lanes), -1};
}

// Rows that lie inner_stride apart; bytes of zero are the number in every type.
template <class S>
void write_zeros(const SoftmaxLayout& layout, S* grad, int64_t rows) {
  if (layout.class_stride == 1) {
    const bool side_by_side = layout.inner_stride == layout.classes;
    const int64_t count = side_by_side ? 1 : rows, numbers = side_by_side ? rows * layout.classes : layout.classes;
    for (int64_t j = 0; j < count; ++j) std::memset(grad + j * layout.inner_stride, 0, numbers * sizeof(S));
    return;
  }
  for (int64_t c = 0; c < layout.classes; ++c) {
    S* column = grad + c * layout.class_stride;
    if (layout.inner_stride == 1) {
      std::memset(column, 0, rows * sizeof(S));
    } else {
      for (int64_t j = 0; j < rows; ++j) column[j * layout.inner_stride] = store<S>(Accumulate<S>(0));
    }
  }
}

template <class S, class Loss>
void backward_of_targets(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  S* grad = static_cast<S*>(args.grad);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t stop = least(end, first + kTile);
    RowOffsets offsets(args.grad_layout, first);
    for (int64_t row = first; row < stop;) {
      const auto [offset, rows] = offsets.next(stop - row);
      write_zeros(args.grad_layout, grad + offset, rows);
      row += rows;
    }
    T upstream[kTile];
    read_upstream(args, args.upstream, args.upstream_stride, first, stop - first, T(1), upstream);
    for_each_target<T>(args, args.grad_layout, first, stop, [&](int64_t row, int64_t offset, T weight, T counts) {
      const T of_row = T(double(upstream[row - first]) * args.scale * double(counts));
      grad[offset] = store<S>(loss.gradient(weight, of_row));
    });
  }
}

}  // namespace fusedloss::FUSEDLOSS_ISA
