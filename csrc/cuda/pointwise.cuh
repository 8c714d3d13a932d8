// Runs any pointwise loss. One pass makes the losses, their sum, a gradient, or the sum and a gradient.
#pragma once

#include "pointwise_dense.cuh"
#include "pointwise_strided.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <template <class> class Functor>
int run_pointwise(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  if (all_dense(result, args)) {
    return with_storage(args.input.dtype, [&](auto storage) -> int {
      using S = decltype(storage);
      return with_specialised<Functor<Accumulate<S>>>(args.params, storage, [&](const auto& loss, S) -> int {
        return with_result<false, makes_gradient_in_forward<S>>(
            result, [&](auto made) -> int { return run_dense<made.value, S>(loss, args, stream); });
      });
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
