// Turns the loss and dtype of a call into a functor and a storage type, for the drivers of both devices.
#pragma once

#include "pointwise.h"
#include "softmax.h"

namespace fusedloss::FUSEDLOSS_ISA {

template <class Functor, class = void>
constexpr bool has_specialised = false;
template <class Functor>
constexpr bool has_specialised<Functor, std::void_t<typename Functor::Specialised>> = true;

// What else a pointwise functor may have: a slope by its target that is not the other one's negative, one by its third
// operand, a form of its own for a weight of the positive term, and a domain.
template <class Functor, class = void>
constexpr bool has_target_slope = false;
template <class Functor>
constexpr bool has_target_slope<Functor, std::void_t<decltype(&Functor::grad_target)>> = true;

template <class Functor, class = void>
constexpr bool has_third_slope = false;
template <class Functor>
constexpr bool has_third_slope<Functor, std::void_t<decltype(&Functor::grad_third)>> = true;

template <class Functor, class = void>
constexpr bool has_positive_weight = false;
template <class Functor>
constexpr bool has_positive_weight<Functor, std::void_t<typename Functor::WithPositiveWeight>> = true;

template <class Functor, class = void>
constexpr bool of_probabilities = false;
template <class Functor>
constexpr bool of_probabilities<Functor, std::void_t<decltype(&Functor::is_probability)>> = true;

template <class Functor, class = void>
constexpr bool of_variances = false;
template <class Functor>
constexpr bool of_variances<Functor, std::void_t<decltype(&Functor::is_negative)>> = true;

// Targets are 0 or 1 or between, so that class indices can stand for them; the loss is finite at x = 0, t = 0.
template <class Functor, class = void>
constexpr bool takes_class_indices = false;
template <class Functor>
constexpr bool takes_class_indices<Functor, std::enable_if_t<Functor::takes_class_indices>> = true;

// What a functor says of its operands if it is not as most are: whether shapes broadcast, whether the target may hold
// integers, and whether the losses lie in memory as the target does, rather than as the input.
template <class Functor, class = void>
constexpr bool broadcasts = Functor::of_difference;
template <class Functor>
constexpr bool broadcasts<Functor, std::enable_if_t<Functor::broadcasts>> = true;

template <class Functor, class = void>
constexpr bool takes_integers = Functor::result == ResultDType::Promoted;
template <class Functor>
constexpr bool takes_integers<Functor, std::void_t<decltype(Functor::takes_integers)>> = Functor::takes_integers;

template <class Functor, class = void>
constexpr bool target_first = Functor::result == ResultDType::OfTarget;
template <class Functor>
constexpr bool target_first<Functor, std::enable_if_t<Functor::target_first>> = true;

// Where the parameters may lie; a functor without them declares none.
template <class Functor, class = void>
struct Params {
  static constexpr const Range* ranges = nullptr;
  static constexpr int count = 0;
};
template <class Functor>
struct Params<Functor, std::void_t<decltype(Functor::params)>> {
  static constexpr const Range* ranges = Functor::params;
  static constexpr int count = sizeof Functor::params / sizeof(Range);
};

// Whether it reads a third operand beside x and t.
template <class Functor, class = void>
constexpr bool takes_third = false;
template <class Functor>
constexpr bool takes_third<Functor, std::enable_if_t<Functor::takes_third>> = true;

// A formula of so many numbers that on a GPU a thread takes one vector at a time, and two blocks are resident.
template <class Functor, class = void>
constexpr bool is_long = false;
template <class Functor>
constexpr bool is_long<Functor, std::enable_if_t<Functor::is_long>> = true;

template <class Functor>
constexpr PointwiseTraits pointwise_traits() {
  return {Functor::of_difference,
          has_target_slope<Functor>,
          has_positive_weight<Functor>,
          of_probabilities<Functor>,
          takes_class_indices<Functor>,
          broadcasts<Functor>,
          takes_integers<Functor>,
          target_first<Functor>,
          has_third_slope<Functor>,
          of_variances<Functor>,
          Functor::result,
          Params<Functor>::ranges,
          Params<Functor>::count};
}

// A functor's value (Losses) or one of its slopes (Grad, TargetGrad, ThirdGrad) at the arguments it takes.
template <PointwiseResult kResult, class Functor, class... T>
FUSEDLOSS_HD auto call_functor(const Functor& loss, T... arguments) {
  if constexpr (kResult == PointwiseResult::Losses) return loss.value(arguments...);
  if constexpr (kResult == PointwiseResult::Grad) return loss.grad(arguments...);
  if constexpr (kResult == PointwiseResult::TargetGrad) return loss.grad_target(arguments...);
  if constexpr (kResult == PointwiseResult::ThirdGrad) return loss.grad_third(arguments...);
}
// The same at an element, whose third operand only some functors take.
template <PointwiseResult kResult, class Functor, class T>
FUSEDLOSS_HD T evaluate(const Functor& loss, T x, T t, T third) {
  if constexpr (takes_third<Functor>) {
    return call_functor<kResult>(loss, x, t, third);
  } else {
    return call_functor<kResult>(loss, x, t);
  }
}

// Calls f with a value of the storage type.
template <class F>
auto with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::Double:
      return f(double());
    case DType::BFloat16:
      return f(bf16());
    case DType::Half:
      return f(fp16());
    default:
      return f(float());
  }
}

// Calls f with a functor and a storage type. Where Functor::Specialised, a faster form, applies to the parameters, it
// takes the functor's place.
template <class Functor, class S, class F>
auto with_specialised(const double* params, S storage, F f) {
  if constexpr (has_specialised<Functor>) {
    if (Functor::applies(params)) return f(Functor::specialised(params), storage);
  }
  return f(Functor(params), storage);
}

// The same for a softmax loss, whose specialised form may have one of its own.
template <class Functor, class S, class F>
auto with_specialised(const SoftmaxArgs& args, S storage, F f) {
  if constexpr (has_specialised<Functor>) {
    if (Functor::applies(args.params)) return with_specialised<typename Functor::Specialised>(args, storage, f);
  }
  return f(Functor(args.params, args.logits_layout.classes), storage);
}

// Calls f with the functor of a pointwise loss that takes class indices.
template <class F>
auto with_indexed_functor(Pointwise loss, DType dtype, const double* params, F f) {
  switch (loss) {
#define FUSEDLOSS_CASE(name, Functor)                                                        \
  case Pointwise::name:                                                                      \
    if constexpr (takes_class_indices<Functor<float>>) {                                     \
      return with_storage(dtype, [&](auto storage) {                                         \
        return with_specialised<Functor<Accumulate<decltype(storage)>>>(params, storage, f); \
      });                                                                                    \
    }                                                                                        \
    break;
    FUSEDLOSS_POINTWISE(FUSEDLOSS_CASE)
#undef FUSEDLOSS_CASE
  }
  __builtin_unreachable();
}

template <class F>
auto with_functor(Softmax loss, const SoftmaxArgs& arguments, F f) {
  switch (loss) {
#define FUSEDLOSS_CASE(name, Functor)                                                         \
  case Softmax::name:                                                                         \
    return with_storage(arguments.dtype, [&](auto storage) {                                  \
      return with_specialised<Functor<Accumulate<decltype(storage)>>>(arguments, storage, f); \
    });
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_CASE)
#undef FUSEDLOSS_CASE
  }
  __builtin_unreachable();
}

// Calls f with the storage type of class probabilities beside logits of type S.
template <class S, class F>
auto with_probabilities(const SoftmaxArgs& args, S storage, F f) {
  if constexpr (!std::is_same_v<S, Accumulate<S>>) {
    if (args.wide_probabilities) return f(Accumulate<S>());
  }
  return f(storage);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
