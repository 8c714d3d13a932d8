// The pass that reads the logits once and writes the gradient once; included once per instruction set.

#include "softmax.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// The statistics that forward saved.
template <class S, class Loss>
void read_statistics(Tile<Accumulate<S>>& tile, const SoftmaxArgs& args) {
  using T = Accumulate<S>;
  const T* saved = static_cast<const T*>(args.statistics) + tile.row;
  const int64_t rows = args.logits_layout.rows;
  for (int64_t j = 0; j < tile.count; ++j) tile.set(j, read_saved<typename Loss::Sum>(saved, rows, j));
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
      tile.template read_logits<S>(loss, args);
      read_statistics<S, Loss>(tile, args);
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
