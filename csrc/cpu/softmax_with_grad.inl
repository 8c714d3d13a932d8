// Forward and backward of a mean or sum in one pass, for an upstream gradient of 1: the exponentials are kept, so that
// each logit is read once and has one taken; included once per instruction set. Not for float16, whose unscaled
// gradient would underflow.

#include "softmax.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// Losses whose gradient needs only the exponential of a logit.
template <class Loss>
constexpr bool keeps_exponentials = Loss::reads_row && !Loss::Sum::has_entropy && !decltype(Loss::logit)::changes;

// Shorter ones cost more in tails and lane sums than exponentials do.
constexpr int64_t kShortestRowKept = 64;

template <class S, class P, class Loss, class T>
void write_kept(const Loss& loss, const SoftmaxArgs& args, const Tile<T>& tile, const Gradients<T>& gradients,
                int64_t j, const Kept<S>& kept) {
  const int64_t classes = args.logits_layout.classes;
  S* grad = kept.grad;
  with_factors<P, T>(loss, args, tile.row + j, [&](const auto& factors) {
    for (int64_t block = 0; block < classes; block += kBlock) {
      ColumnCoefficients<T> coefficients = gradients.of_columns(j);
      coefficients.exponential *= exp(kept.max_of_block[block / kBlock] - tile.max[j]);
      const int64_t last = least(classes, block + kBlock);
      const auto gradient_of = [&](int64_t c, T exponential) {
        return column_gradient<typename Loss::Sum>(coefficients, Column<T>{exponential, T(0), factors(c)});
      };
      if constexpr (std::is_same_v<S, T>) {
#pragma GCC ivdep
        for (int64_t c = block; c < last; ++c) grad[c] = gradient_of(c, kept.exponentials[c]);
      } else {
        const auto write = [&](int64_t c, const T* exponentials, S* to) {
          T lanes[kLanes];
#pragma GCC ivdep
          for (int lane = 0; lane < kLanes; ++lane) {
            lanes[lane] = gradient_of(c + Group<S>::column_of(lane), exponentials[lane]);
          }
          Group<S>::write(lanes, to);
        };
        int64_t c = block;
        for (; c + kLanes <= last; c += kLanes) write(c, kept.exponentials + c, grad + c);
        if (c == last) continue;
        S of_last[kLanes];  // of a group that begins before its columns
        write(last - kLanes, kept.exponentials + c, of_last);
        std::memcpy(grad + c, of_last + kLanes - (last - c), (last - c) * sizeof(S));
      }
    }
  });
  if (tile.y[j] >= 0) grad[tile.y[j]] = store<S>(gradients.own[j]);
}

// Rows whose classes lie side by side: the exponentials stay in the gradient's own memory, or in `scratch` where the
// gradient is of a half type.
template <class S, class P, class Loss>
SoftmaxSums with_grad_by_rows(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end,
                              Accumulate<S>* scratch) {
  using T = Accumulate<S>;
  const int64_t classes = args.logits_layout.classes, blocks = (classes + kBlock - 1) / kBlock;
  const int64_t kept_numbers = softmax_kept(classes);
  const int64_t most = least(kTile / blocks, kSoftmaxScratch / kept_numbers), rows = most > 0 ? most : 1;
  SoftmaxSums sums = {0, 0, -1};
  Tile<T> tile;
  Gradients<T> gradients;
  T max_of_block[kTile];
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = least(end, first + rows);
    tile.open(args, first, stop, false);
    tile.template read_logits<S>(loss, args);
    RowOffsets kept_offsets(args.grad_layout, first), offsets = kept_offsets;
    const auto kept_of = [&](int64_t j, S* grad) {
      T* exponentials = nullptr;
      if constexpr (std::is_same_v<S, T>) {
        exponentials = grad;
      } else {
        exponentials = scratch + j * kept_numbers;
      }
      return Kept<S>{exponentials, max_of_block + j * blocks, grad};
    };
    for (int64_t j = 0; j < tile.count; ++j) {
      const Kept<S> kept = kept_of(j, static_cast<S*>(args.grad) + kept_offsets.next());
      if (tile.active(j)) {
        tile.set(j, rounded<T>(statistics_of<S, P>(loss, args, first + j, 0, classes, tile.y[j], kept)));
      } else {
        tile.set(j, {0, 0, 0, 0});
      }
    }
    add(sums, finish(loss, tile, args));
    coefficients(loss, tile, args, gradients);
    for (int64_t j = 0; j < tile.count; ++j) {
      S* grad = static_cast<S*>(args.grad) + offsets.next();
      if (tile.active(j)) {
        write_kept<S, P>(loss, args, tile, gradients, j, kept_of(j, grad));
      } else {
        for (int64_t c = 0; c < classes; ++c) grad[c] = store<S>(T(0));
      }
    }
  }
  return sums;
}

// Rows whose classes lie apart, or are few: the exponentials stay in the block of a tile.
template <class S, class P, class Loss>
SoftmaxSums with_grad_by_columns(const Loss& loss, const SoftmaxArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  SoftmaxSums sums = {0, 0, -1};
  Tile<T> tile;
  Gradients<T> gradients;
  Columns<S, P, Loss> columns(loss, args);
  T max[kTile];
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = first + least(end - first, columns.rows_left(first));
    tile.open(args, first, stop, false);
    for (int64_t j = 0; j < tile.padded; ++j) tile.slope[j] = T(1);
    columns.template collect<true>(tile);
    add(sums, finish(loss, tile, args));
    for (int64_t j = 0; j < tile.padded; ++j) max[j] = tile.max[j];
    coefficients(loss, tile, args, gradients);
    for (int64_t j = 0; j < tile.padded; ++j) gradients.exponential_coefficient[j] *= exp(max[j] - tile.max[j]);
    columns.write_kept(tile, gradients);
  }
  if (args.streams) end_stream();
  return sums;
}

bool softmax_with_grad(Softmax loss, const SoftmaxArgs& args, int64_t begin, int64_t end, void* scratch,
                       SoftmaxSums* sums) {
  if (args.grad == args.logits) return false;
  const int64_t classes = args.logits_layout.classes;
  return with_types(loss, args, [&](const auto& functor, auto storage, auto probability) {
    using S = decltype(storage);
    using P = decltype(probability);
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (keeps_exponentials<Loss> && !std::is_same_v<S, fp16>) {
      const bool rows = args.grad_layout.class_stride == 1 && by_rows<Loss>(args, kShortestRowKept);
      if (classes > kColumns && (!rows || classes > kTile * kBlock)) return false;
      *sums = rows ? with_grad_by_rows<S, P>(functor, args, begin, end, static_cast<Accumulate<S>*>(scratch))
                   : with_grad_by_columns<S, P>(functor, args, begin, end);
      return true;
    }
    return false;
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
