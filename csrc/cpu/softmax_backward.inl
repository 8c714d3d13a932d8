// The pass that reads the logits once and writes the gradient once; included once per instruction set.

#include "softmax.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// The coefficients of a tile from the statistics that forward saved; leaves the max over all columns in the tile.
template <class S, class Loss>
void coefficients(const Loss& loss, Tile<Accumulate<S>>& tile, const SoftmaxArgs& args,
                  Gradients<Accumulate<S>>& gradients) {
  using T = Accumulate<S>;
  tile.template read_logits<S>(loss, args);
  const T* saved = static_cast<const T*>(args.statistics) + tile.row;
  const int64_t rows = args.logits_layout.rows;
  for (int64_t j = 0; j < tile.count; ++j) {
    const T third = Loss::sum == Sum::none ? T(0) : saved[2 * rows + j];
    tile.set(j, {saved[j], saved[rows + j], third, third});
  }
  T upstream[kTile], upstream_second[kTile];
  read_upstream<S>(args.upstream, args.upstream_stride, args.wide, tile.row, tile.count, T(1), upstream);
  read_upstream<S>(args.upstream_second, args.upstream_second_stride, args.wide, tile.row, tile.count, T(0),
                   upstream_second);
  for (int64_t j = 0; j < tile.count; ++j) {
    upstream[j] = select(tile.counts[j] == T(0), T(0), T(double(upstream[j]) * args.scale));
  }
  for (int64_t j = tile.count; j < tile.padded; ++j) upstream[j] = upstream_second[j] = 0;
  for (int64_t j = 0; j < tile.padded; ++j) {
    const T factor = Loss::sum == Sum::linear && !Loss::soft ? tile.weight[j] : T(0);
    const Row<T> row = complete<Loss::sum>(tile.statistics(j), tile.logit[j], factor);
    const Coefficients<T> of = loss.gradient(row, tile.weight[j], upstream[j], upstream_second[j]);
    gradients.factor[j] = (of.a + of.b) * row.inverse;
    gradients.lean[j] = of.h * row.inverse;
    gradients.share[j] = of.s;
    gradients.own[j] = of.own(row, tile.logit[j], factor) * tile.slope[j];
    tile.max[j] = row.max;
  }
}

template <class S, class P, class Loss>
void backward(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end, int64_t first_class,
              int64_t last_class) {
  using T = Accumulate<S>;
  const bool rows = args.grad_layout.class_stride == 1 && by_rows<Loss>(args, kShortestRowBackward);
  Tile<T> tile;
  Columns<S, P, Loss> columns(loss, args);
  Gradients<T> gradients;
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, rows ? kTile : columns.rows_left(first));
    tile.open(args, first, stop, args.upstream_second && Loss::second_of_ignored);
    if constexpr (Loss::reads_row) {
      coefficients<S>(loss, tile, args, gradients);
      rows ? write_by_rows<S, P>(loss, tile, args, gradients, first_class, last_class) : columns.write(tile, gradients);
    } else {
      write_targets<S>(loss, tile, args);
    }
  }
  if (args.streams) end_stream();
}

void softmax_backward(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  with_types(loss, args, [&](const auto& functor, auto storage, auto probability) {
    backward<decltype(storage), decltype(probability)>(functor, args, begin, end, 0, args.logits_layout.classes);
  });
}

void softmax_backward_part(Softmax loss, const SoftmaxArgs& args, int64_t row, int64_t part) {
  const int64_t first = part * kSoftmaxPart, last = least(args.logits_layout.classes, first + kSoftmaxPart);
  with_types(loss, args, [&](const auto& functor, auto storage, auto probability) {
    backward<decltype(storage), decltype(probability)>(functor, args, row, row + 1, first, last);
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
