// The pointwise driver for any functor over dense arrays of one type; included once per instruction set.

#include "../kernels/functors.h"
#include "lanes.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// What a pass reads and writes. Where an operand is null it counts as 1, or the pass has no use for it.
template <class S>
struct Arrays {
  const S *input, *target, *weight, *third, *upstream;
  S* output;
  Accumulate<S> scale;  // of gradients
};

// The value (Losses) or a scaled slope (every Grad) of the loss at an element, times the element's weight.
template <bool kWeighted, class S, class Loss>
struct Elements {
  using T = Accumulate<S>;
  Loss loss;
  Arrays<S> arrays;

  template <PointwiseResult kResult>
  FUSEDLOSS_HD T at(int64_t i) const {
    T number = evaluate<kResult>(loss, load(arrays.input[i]), load(arrays.target[i]), third(i));
    if constexpr (kResult != PointwiseResult::Losses) number *= arrays.scale;
    return kWeighted ? number * load(arrays.weight[i]) : number;
  }

 private:
  FUSEDLOSS_HD T third(int64_t i) const {
    if constexpr (takes_third<Loss>) return load(arrays.third[i]);
    return T(1);
  }
};

// The sum of at(i), which may store what belongs to i.
template <class T, class F>
double sum_over(int64_t count, F at) {
  constexpr int64_t kSumBlock = 512;  // float within a block, 16 additions a lane; double across blocks
  double sum = 0;
  for (int64_t block = 0; block < count; block += kSumBlock) {
    const int64_t stop = block + kSumBlock < count ? block + kSumBlock : count;
    T lanes[kLanes] = {};
    int64_t i = block;
    for (; i + kLanes <= stop; i += kLanes) {
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += at(i + lane);
    }
    for (int lane = 0; i + lane < stop; ++lane) lanes[lane] += at(i + lane);
    sum += double(add_lanes(lanes));
  }
  return sum;
}

template <class S, class F>
void store_each(S* output, int64_t count, F at) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) output[i] = store<S>(at(i));
}

template <bool kWeighted, class S, class Loss>
double run_elements(const Loss& loss, PointwiseResult result, const Arrays<S>& arrays, int64_t count) {
  using T = Accumulate<S>;
  const Elements<kWeighted, S, Loss> elements = {loss, arrays};
  const S* upstream = arrays.upstream;
  S* output = arrays.output;
  switch (result) {
    case PointwiseResult::Sum:
      return sum_over<T>(
          count, [=](int64_t i)
                     __attribute__((always_inline)) { return elements.template at<PointwiseResult::Losses>(i); });
    case PointwiseResult::SumAndGrad:  // in one pass, which shares what value and slope have in common
      return sum_over<T>(
          count, [=](int64_t i) __attribute__((always_inline)) {
            const T value = elements.template at<PointwiseResult::Losses>(i);
            output[i] = store<S>(elements.template at<PointwiseResult::Grad>(i));
            return value;
          });
    case PointwiseResult::Losses:
      store_each(
          output, count, [=](int64_t i) __attribute__((always_inline)) {
            return elements.template at<PointwiseResult::Losses>(i);
          });
      return 0;
    case PointwiseResult::TargetGrad:
      if constexpr (has_target_slope<Loss>) {
        store_each(
            output, count, [=](int64_t i) __attribute__((always_inline)) {
              return elements.template at<PointwiseResult::TargetGrad>(i) * (upstream ? load(upstream[i]) : T(1));
            });
      }
      return 0;
    case PointwiseResult::ThirdGrad:
      if constexpr (has_third_slope<Loss>) {
        store_each(
            output, count, [=](int64_t i) __attribute__((always_inline)) {
              return elements.template at<PointwiseResult::ThirdGrad>(i) * (upstream ? load(upstream[i]) : T(1));
            });
      }
      return 0;
    default:
      if (upstream) {
        store_each(
            output, count, [=](int64_t i) __attribute__((always_inline)) {
              return elements.template at<PointwiseResult::Grad>(i) * load(upstream[i]);
            });
      } else {
        store_each(
            output, count, [=](int64_t i) __attribute__((always_inline)) {
              return elements.template at<PointwiseResult::Grad>(i);
            });
      }
      return 0;
  }
}

// Answers PointwiseResult::CheckDomain for all elements together.
template <class S, class Loss>
int check_domain(const Arrays<S>& arrays, int64_t count) {
  if constexpr (of_variances<Loss>) {
    int negative = 0;
    for (int64_t i = 0; i < count; ++i) negative |= int(Loss::is_negative(load(arrays.third[i])));
    return 3 * negative;
  } else {
    int worst = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int of_input = 2 * !Loss::is_probability(load(arrays.input[i]));
      const int of_either = of_input | int(!Loss::is_probability(load(arrays.target[i])));
      worst = worst > of_either ? worst : of_either;
    }
    return worst > 2 ? 2 : worst;
  }
}

template <class S, class Loss>
double run_arrays(const Loss& loss, PointwiseResult result, const Arrays<S>& arrays, int64_t count) {
  if constexpr (of_probabilities<Loss> || of_variances<Loss>) {
    if (result == PointwiseResult::CheckDomain) return check_domain<S, Loss>(arrays, count);
  }
  return arrays.weight ? run_elements<true>(loss, result, arrays, count)
                       : run_elements<false>(loss, result, arrays, count);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
