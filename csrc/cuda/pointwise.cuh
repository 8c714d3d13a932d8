// Runs any pointwise loss. One pass makes the losses, their sum, a gradient, or the sum and a gradient.
#pragma once

#include "pointwise_dense.cuh"
#include "pointwise_strided.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <class Functor, class = void>
constexpr bool has_form_for_halves = false;
template <class Functor>
constexpr bool has_form_for_halves<Functor, std::void_t<typename Functor::ForHalves>> = true;

// The functor for operands of type S.
template <class Functor, class S, bool = sizeof(S) == 2 && has_form_for_halves<Functor>>
struct ForStorage {
  using type = Functor;
};
template <class Functor, class S>
struct ForStorage<Functor, S, true> {
  using type = typename Functor::ForHalves;
};

template <template <class> class Functor>
int run_pointwise(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  if (all_dense(result, args) && begin_alike(result, args)) {
    return with_storage(args.input.dtype, [&](auto storage) -> int {
      using S = decltype(storage);
      using Loss = typename ForStorage<Functor<Accumulate<S>>, S>::type;
      const auto run = [&](const auto& loss, S) -> int {
        return with_result<false, false, makes_gradient_in_forward<S>>(
            result, [&](auto made) -> int { return run_dense<made.value, S>(loss, args, stream); });
      };
      if (takes_third<Loss> || !args.third.data) return with_specialised<Loss>(args.params, storage, run);
      if constexpr (has_positive_weight<Loss>) return run(typename Loss::WithPositiveWeight(), storage);
      return cudaErrorInvalidValue;
    });
  }
  if (result == PointwiseResult::SumAndGrad && args.output_dtype == DType::Half) return cudaErrorInvalidValue;
  if (args.arithmetic == DType::Double) return run_strided_in<Functor, double>(result, args, stream);
  const bool fits = (result == PointwiseResult::Sum || args.output_dtype != DType::Double) &&
                    of_operands(result, args, [](const Operand& from) { return from.dtype != DType::Double; });
  return fits ? run_strided_in<Functor, float>(result, args, stream) : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
