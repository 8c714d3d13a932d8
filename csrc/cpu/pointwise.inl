// The pointwise driver for any functor; included once per instruction set.

#include "../with_functor.h"
#include "lanes.inl"

namespace fusedloss::FUSEDLOSS_ISA {

// The sum of at(i), which may store what belongs to i.
template <class T, class F>
double sum_over(int64_t begin, int64_t end, F at) {
  constexpr int64_t kBlock = 4096;  // float within a block, double across blocks
  double sum = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
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

template <class S, bool kWeighted, class Loss>
double sum_of(const Loss& loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const S* input = static_cast<const S*>(args.input);
  const S* target = static_cast<const S*>(args.target);
  const S* weight = static_cast<const S*>(args.weight);
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    const T value = loss.value(load(input[i]), load(target[i]));
    return kWeighted ? value * load(weight[i]) : value;
  };
  return sum_over<T>(begin, end, at);
}

template <class S, bool kWeighted, class Loss>
void losses_of(const Loss& loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const S* input = static_cast<const S*>(args.input);
  const S* target = static_cast<const S*>(args.target);
  const S* weight = static_cast<const S*>(args.weight);
  S* output = static_cast<S*>(args.output);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const T value = loss.value(load(input[i]), load(target[i]));
    output[i] = store<S>(kWeighted ? value * load(weight[i]) : value);
  }
}

template <class S, bool kWeighted, bool kOneUpstream, class Loss>
void grad_of(const Loss& loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const S* input = static_cast<const S*>(args.input);
  const S* target = static_cast<const S*>(args.target);
  const S* weight = static_cast<const S*>(args.weight);
  const S* upstream = static_cast<const S*>(args.upstream);
  S* output = static_cast<S*>(args.output);
  const T scale = T(args.scale) * (kOneUpstream ? load(upstream[0]) : T(1));
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    T slope = loss.grad(load(input[i]), load(target[i])) * scale;
    if constexpr (!kOneUpstream) slope *= load(upstream[i]);
    if constexpr (kWeighted) slope *= load(weight[i]);
    output[i] = store<S>(slope);
  }
}

// Both in one pass, which shares what value and slope have in common.
template <class S, bool kWeighted, class Loss>
double sum_and_grad_of(const Loss& loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const S* input = static_cast<const S*>(args.input);
  const S* target = static_cast<const S*>(args.target);
  const S* weight = static_cast<const S*>(args.weight);
  S* output = static_cast<S*>(args.output);
  const T scale = T(args.scale);
  const auto at = [=](int64_t i) __attribute__((always_inline)) {
    const T x = load(input[i]), t = load(target[i]), w = kWeighted ? load(weight[i]) : T(1);
    output[i] = store<S>(loss.grad(x, t) * scale * w);
    return loss.value(x, t) * w;
  };
  return sum_over<T>(begin, end, at);
}

inline double pointwise_sum(Pointwise loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    using S = decltype(storage);
    return args.weight ? sum_of<S, true>(functor, args, begin, end) : sum_of<S, false>(functor, args, begin, end);
  });
}

inline void pointwise_losses(Pointwise loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    using S = decltype(storage);
    args.weight ? losses_of<S, true>(functor, args, begin, end) : losses_of<S, false>(functor, args, begin, end);
  });
}

inline void pointwise_grad(Pointwise loss, const PointwiseArgs& args, int64_t begin, int64_t end) {
  with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    using S = decltype(storage);
    if (args.upstream_stride == 0) {
      args.weight ? grad_of<S, true, true>(functor, args, begin, end)
                  : grad_of<S, false, true>(functor, args, begin, end);
    } else {
      args.weight ? grad_of<S, true, false>(functor, args, begin, end)
                  : grad_of<S, false, false>(functor, args, begin, end);
    }
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
