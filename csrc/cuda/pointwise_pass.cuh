// What the pointwise kernels share: what a pass makes of an element, its sum, and which operands it reads.
#pragma once

#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// What a pass makes of an element.
template <PointwiseResult kResult, class T, class Loss>
struct Pass {
  static constexpr bool kSums = kResult == PointwiseResult::Sum || kResult == PointwiseResult::SumAndGrad;
  static constexpr bool kStores = kResult != PointwiseResult::Sum;
  static constexpr bool kTakesUpstream = kResult == PointwiseResult::Grad || kResult == PointwiseResult::TargetGrad ||
                                         kResult == PointwiseResult::ThirdGrad;
  static constexpr bool kReports = of_variances<Loss> && !kTakesUpstream;

  const Loss& loss;
  T scale;                // of the gradient: 1 / n for a mean, times the upstream gradient where it is one for all
  bool negative = false;  // whether a variance was

  // Adds to the sum and returns what is stored.
  __device__ T operator()(T x, T t, T third, T weight, T upstream, T& sum) {
    if constexpr (kReports) negative = negative || Loss::is_negative(third);
    if constexpr (kSums) sum += evaluate<PointwiseResult::Losses>(loss, x, t, third) * weight;
    if constexpr (kResult == PointwiseResult::Losses)
      return evaluate<PointwiseResult::Losses>(loss, x, t, third) * weight;
    if constexpr (kResult == PointwiseResult::TargetGrad || kResult == PointwiseResult::ThirdGrad)
      return evaluate<kResult>(loss, x, t, third) * scale * upstream * weight;
    if constexpr (kResult == PointwiseResult::Grad || kResult == PointwiseResult::SumAndGrad)
      return evaluate<PointwiseResult::Grad>(loss, x, t, third) * scale * upstream * weight;
    return T(0);
  }

  // Once a thread has done all of its elements.
  __device__ void report(BadTarget* to) const {
    if constexpr (kReports) {
      if (negative) store_bits(to, bit_cast<uint4>(kNegativeVariance));
    }
  }
};

// ---- one number of any type

template <class T>
__device__ T read_number(const void* from, DType dtype) {
  switch (dtype) {
    case DType::Double:
      return T(*static_cast<const double*>(from));
    case DType::BFloat16:
      return T(load(*static_cast<const bf16*>(from)));
    case DType::Half:
      return T(load(*static_cast<const fp16*>(from)));
    default:
      return T(*static_cast<const float*>(from));
  }
}

template <class T>
__device__ void write_number(void* to, DType dtype, T number) {
  switch (dtype) {
    case DType::Double:
      *static_cast<double*>(to) = double(number);
      break;
    case DType::BFloat16:
      *static_cast<bf16*>(to) = store<bf16>(float(number));
      break;
    case DType::Half:
      *static_cast<fp16*>(to) = store<fp16>(float(number));
      break;
    default:
      *static_cast<float*>(to) = float(number);
  }
}

template <PointwiseResult kResult, class T, class Loss>
__device__ Pass<kResult, T, Loss> pass_of(const Loss& loss, const CudaPointwiseArgs& args) {
  T scale = T(args.scale);
  if constexpr (Pass<kResult, T, Loss>::kTakesUpstream) {
    if (args.one_upstream) scale *= read_number<T>(args.upstream.data, args.upstream.dtype);
  }
  return {loss, scale};
}

template <class T>
__device__ void write_total(const Sums<1>& sums, const CudaPointwiseArgs& args) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(sums, Workspace(args.workspace), shared, [&](const Sums<1>& total) {
    write_number(args.total, args.total_dtype, T(total.values[0] / args.divisor));
  });
}

// ---- host side

// Calls f with the result as a type. SumAndGrad, TargetGrad and ThirdGrad are refused where there is none.
template <bool kHasTargetGrad, bool kHasThirdGrad, bool kMakesGradInForward, class F>
int with_result(PointwiseResult result, F f) {
  using Result = PointwiseResult;
  switch (result) {
    case Result::Losses:
      return f(std::integral_constant<Result, Result::Losses>());
    case Result::Sum:
      return f(std::integral_constant<Result, Result::Sum>());
    case Result::Grad:
      return f(std::integral_constant<Result, Result::Grad>());
    case Result::SumAndGrad:
      if constexpr (kMakesGradInForward) return f(std::integral_constant<Result, Result::SumAndGrad>());
      return cudaErrorInvalidValue;
    case Result::TargetGrad:
      if constexpr (kHasTargetGrad) return f(std::integral_constant<Result, Result::TargetGrad>());
      return cudaErrorInvalidValue;
    case Result::ThirdGrad:
      if constexpr (kHasThirdGrad) return f(std::integral_constant<Result, Result::ThirdGrad>());
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;  // CheckDomain runs on the CPU only
  }
}

inline bool has_upstreams(PointwiseResult result, const PointwiseArgs& args) {
  const bool takes_one =
      result == PointwiseResult::Grad || result == PointwiseResult::TargetGrad || result == PointwiseResult::ThirdGrad;
  return takes_one && !args.one_upstream && args.upstream.data;
}

// Whether f holds for every operand that is read by the element.
template <class F>
bool of_operands(PointwiseResult result, const PointwiseArgs& args, F f) {
  const auto holds = [&](const Operand& operand) { return !operand.data || f(operand); };
  return holds(args.input) && holds(args.target) && holds(args.weight) && holds(args.third) &&
         (!has_upstreams(result, args) || f(args.upstream));
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
