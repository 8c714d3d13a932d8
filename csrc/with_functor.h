// From the loss and dtype of a call to a functor and a storage type, for the drivers of both devices.
#pragma once

#include "kernels.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class Functor, class = void>
constexpr bool has_twin = false;
template <class Functor>
constexpr bool has_twin<Functor, std::void_t<typename Functor::Twin>> = true;

// Calls f with a functor, or with its faster twin where it has one that fits the parameters, and a storage type.
template <class Functor, class S, class F>
auto with_twin(const double* params, S storage, F f) {
  if constexpr (has_twin<Functor>) {
    if (Functor::twin_fits(params)) return f(Functor::twin(params), storage);
  }
  return f(Functor(params), storage);
}

template <template <class> class Functor, class F>
auto with_dtype(DType dtype, const double* params, F f) {
  switch (dtype) {
    case DType::Double:
      return with_twin<Functor<double>>(params, double(), f);
    case DType::BFloat16:
      return with_twin<Functor<float>>(params, bf16(), f);
    case DType::Half:
      return with_twin<Functor<float>>(params, fp16(), f);
    default:
      return with_twin<Functor<float>>(params, float(), f);
  }
}

#define FUSEDLOSS_CASE(name, Functor) \
  case Loss::name:                    \
    return with_dtype<Functor>(dtype, params, f);

template <class F>
auto with_functor(Pointwise loss, DType dtype, const double* params, F f) {
  using Loss = Pointwise;
  switch (loss) { FUSEDLOSS_POINTWISE(FUSEDLOSS_CASE) }
  __builtin_unreachable();
}

// Of the losses that take class indices.
template <class F>
auto with_indexed_functor(Pointwise loss, DType dtype, const double* params, F f) {
  using Loss = Pointwise;
  switch (loss) {
    FUSEDLOSS_INDEXED(FUSEDLOSS_CASE)
    default:
      __builtin_unreachable();
  }
}

template <class F>
auto with_functor(Softmax loss, DType dtype, const double* params, F f) {
  using Loss = Softmax;
  switch (loss) { FUSEDLOSS_SOFTMAX(FUSEDLOSS_CASE) }
  __builtin_unreachable();
}

#undef FUSEDLOSS_CASE

}  // namespace fusedloss::FUSEDLOSS_ISA
