// What holds for a softmax loss whatever its parameters, for those of the list and those compiled apart.
#pragma once

#include "functors.h"

namespace fusedloss {

struct SoftmaxTraits {
  bool mean_by_weight, soft, reads_row, second_of_ignored;
  const Range* params;
  int param_count;
};

namespace FUSEDLOSS_ISA {

template <class Functor>
constexpr SoftmaxTraits softmax_traits() {
  return {Functor::mean_by_weight,    Functor::soft,           Functor::reads_row,
          Functor::second_of_ignored, Params<Functor>::ranges, Params<Functor>::count};
}

// How many numbers a row leaves to backward.
template <class Functor>
int64_t saved_by(const double* params) {
  if constexpr (has_specialised<Functor>) {
    if (Functor::applies(params)) return saved_by<typename Functor::Specialised>(params);
  }
  return Functor::reads_row ? Functor::Sum::saved : 0;
}

}  // namespace FUSEDLOSS_ISA
}  // namespace fusedloss
