// The softmax driver for any functor, what its two passes share; included by both.
//
// Rows go in tiles of kTile. Their statistics are collected in one of two ways, chosen by the layout:
// - by rows (softmax_rows.inl), where the classes of a row lie side by side: vectors along the classes;
// - by columns (softmax_columns.inl), anything else and rows too short to fill vectors: vectors across the rows.
// What is left to do once a row (exp, log, the functor) is then vector code across the tile in either case.
// Forward reads the logits once; backward reads them once and writes the gradient once.
#pragma once

#include "softmax_tile.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// k_c along a row whose classes lie side by side.
template <class P, bool kWeighted, class Loss, class T>
struct Factors {
  const Loss& loss;
  const T* weights;
  const P* probabilities;

  Factors(const Loss& loss_, const SoftmaxArgs& args, int64_t row)
      : loss(loss_),
        weights(static_cast<const T*>(args.weight)),
        probabilities(static_cast<const P*>(args.probabilities)) {
    if (Loss::soft) probabilities += row_offset(args.probabilities_layout, row);
  }
  T operator()(int64_t c) const {
    return loss.factor(kWeighted ? weights[c] : T(1), Loss::soft ? load(probabilities[c]) : T(0));
  }
};

// Calls f with the factors of a row; only a loss that sums them reads the weights.
template <class P, class T, class Loss, class F>
void with_factors(const Loss& loss, const SoftmaxArgs& args, int64_t row, F f) {
  if constexpr (Loss::Sum::has_factors) {
    if (args.weight) return f(Factors<P, true, Loss, T>(loss, args, row));
  }
  f(Factors<P, false, Loss, T>(loss, args, row));
}

// Calls f with a functor, a storage type and that of the probabilities.
template <class F>
auto with_types(Softmax loss, const SoftmaxArgs& args, F f) {
  return with_functor(loss, args, [&](const auto& functor, auto storage) {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (Loss::soft) {
      return with_probabilities(args, storage, [&](auto probability) { return f(functor, storage, probability); });
    } else {
      return f(functor, storage, storage);
    }
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA

#include "softmax_rows.inl"
#include "stream.inl"
#include "softmax_columns.inl"
