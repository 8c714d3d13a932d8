// The pass that reads the logits once and writes the gradient once; included once per instruction set.

#include "softmax.inl"
#include "softmax_targets.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// The statistics that forward saved.
template <class Loss, class T>
void read_statistics(Tile<T>& tile, const SoftmaxArgs& args) {
  const T* saved = static_cast<const T*>(args.statistics) + tile.row;
  const int64_t rows = args.logits_layout.rows;
  for (int64_t j = 0; j < tile.count; ++j) tile.set(j, read_saved<typename Loss::Sum>(saved, rows, j));
}

// What every pass over a tile begins with.
template <class S, class Loss, class T>
void open_with_gradients(const Loss& loss, const SoftmaxArgs& args, int64_t first, int64_t stop, Tile<T>& tile,
                         Gradients<T>& gradients) {
  tile.open(args, first, stop, args.upstream_second && Loss::second_of_ignored);
  tile.template read_logits<S>(loss, args);
  read_statistics<Loss>(tile, args);
  coefficients(loss, tile, args, gradients);
}

template <class S, class P, class Loss>
void backward_by_rows(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end, int64_t first_class,
                      int64_t last_class) {
  Tile<Accumulate<S>> tile;
  Gradients<Accumulate<S>> gradients;
  for (int64_t first = begin; first < end; first += kTile) {
    open_with_gradients<S>(loss, args, first, least(end, first + kTile), tile, gradients);
    write_by_rows<S, P>(loss, tile, args, gradients, first_class, last_class);
  }
}

template <class S, class P, class Loss>
void backward_by_columns(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  Tile<Accumulate<S>> tile;
  Gradients<Accumulate<S>> gradients;
  Columns<S, P, Loss> columns(loss, args);
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, columns.rows_left(first));
    open_with_gradients<S>(loss, args, first, stop, tile, gradients);
    columns.write(tile, gradients);
  }
  if (args.streams) end_stream();
}

template <class S, class P, class Loss>
void backward(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end, int64_t first_class,
              int64_t last_class) {
  if constexpr (!Loss::reads_row) {
    backward_of_targets<S>(loss, args, begin, end);
  } else if (args.grad_layout.class_stride == 1 && by_rows<Loss>(args, kShortestRowBackward)) {
    backward_by_rows<S, P>(loss, args, begin, end, first_class, last_class);
  } else {
    backward_by_columns<S, P>(loss, args, begin, end);
  }
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
