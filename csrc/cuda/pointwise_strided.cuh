// Operands of any type and strides, read one by one.
//
// Bytes an element moves: the sizes of input, target and output, and of a weight or an upstream gradient of its own;
// what is broadcast comes from a cache. An operand that is not dense costs one division for each dimension but the
// last, done by multiplication.
#pragma once

#include <cstdlib>

#include "pointwise_pass.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

constexpr int kGroup = 4;  // elements of a thread in flight, each side by side with those of the other threads
// Blocks resident on a multiprocessor: 64 registers a thread, 80 for double or one more operand.
template <class T, class Loss>
constexpr int kStridedBlocks = sizeof(T) == 8 || takes_third<Loss> ? 3 : 4;

// How elements are numbered, and whether numbers and offsets fit in 32 bits. Division is by multiplication with what
// the host divided.
struct Numbering {
  int dims;
  bool narrow;
  int64_t sizes[kMaxDims];
  uint64_t inverses[kMaxDims];  // 2^shift / size, rounded up; (2^64 - 1) / size, rounded down, where not narrow
  int shifts[kMaxDims];

  __device__ __forceinline__ uint32_t quotient(uint32_t number, int d) const {
    return uint32_t((uint64_t(number) * uint32_t(inverses[d])) >> shifts[d]);
  }
  __device__ __forceinline__ int64_t quotient(int64_t number, int d) const {
    const int64_t quotient = int64_t(multiply_high(uint64_t(number), inverses[d]));  // or one too small
    return quotient + (number - quotient * sizes[d] >= sizes[d]);
  }
};

struct Group {
  int64_t first;
  int left;  // from the first to the end, as far as it matters

  __device__ Group(int64_t first_, int64_t count)
      : first(first_), left(int(least(count - first_, kGroup * kThreads))) {}
  __device__ bool has(int k) const { return k * kThreads < left; }
};

// The offsets of a group's elements in an operand; for elements beyond the end they mean nothing.
__device__ __forceinline__ void find_offsets(const Operand& operand, const Numbering& numbering, const Group& group,
                                             int64_t (&offsets)[kGroup]) {
  const int last = numbering.dims - 1;
  if (numbering.narrow) {
    uint32_t rest[kGroup], offset[kGroup] = {};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) rest[k] = uint32_t(group.first) + k * kThreads;
#pragma unroll 1
    for (int d = 0; d < last; ++d) {
      const uint32_t size = uint32_t(numbering.sizes[d]), stride = uint32_t(operand.strides[d]);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const uint32_t quotient = numbering.quotient(rest[k], d);
        offset[k] += (rest[k] - quotient * size) * stride;
        rest[k] = quotient;
      }
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) offsets[k] = int32_t(offset[k] + rest[k] * uint32_t(operand.strides[last]));
  } else {
    // One after the other: rare enough that its code should be small.
#pragma unroll 1
    for (int turn = 0; turn < kGroup; ++turn) {
      int64_t rest = group.first + turn * kThreads, offset = 0;
#pragma unroll 1
      for (int d = 0; d < last; ++d) {
        const int64_t quotient = numbering.quotient(rest, d);
        offset += (rest - quotient * numbering.sizes[d]) * operand.strides[d];
        rest = quotient;
      }
      offset += rest * operand.strides[last];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) offsets[k] = k == turn ? offset : offsets[k];
    }
  }
}

// An operand's numbers for a group, as they lie in memory. The loads of several operands are under way before the first
// is waited for.
template <class T>
struct Numbers {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits[kGroup] = {};

  __device__ __forceinline__ void fetch(const Operand& operand, const Numbering& numbering, const Group& group) {
    int64_t offsets[kGroup] = {};
    if (!operand.dense) find_offsets(operand, numbering, group, offsets);
    switch (operand.dtype) {
      case DType::Double:
        if constexpr (sizeof(T) == 8) fetch<double, uint64_t>(operand, group, offsets);
        break;
      case DType::Float:
        fetch<float, uint32_t>(operand, group, offsets);
        break;
      default:
        fetch<bf16, uint16_t>(operand, group, offsets);  // or fp16, of the same size
    }
  }

  __device__ __forceinline__ void decode(DType dtype, T (&numbers)[kGroup], bool given = true) const {
    if (!given) return decode(numbers, [](Bits) { return T(1); });
    switch (dtype) {
      case DType::Double:
        if constexpr (sizeof(T) == 8) decode(numbers, [](Bits b) { return bit_cast<double>(b); });
        break;
      case DType::BFloat16:
        decode(numbers, [](Bits b) { return load(bf16{uint16_t(b)}); });
        break;
      case DType::Half:
        decode(numbers, [](Bits b) { return load(fp16{uint16_t(b)}); });
        break;
      default:
        decode(numbers, [](Bits b) { return bit_cast<float>(uint32_t(b)); });
    }
  }

 private:
  template <class S, class Word>
  __device__ __forceinline__ void fetch(const Operand& operand, const Group& group, const int64_t (&offsets)[kGroup]) {
    const S* data = static_cast<const S*>(operand.data);
    if (operand.dense) {
      data += group.first;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (group.has(k)) bits[k] = bit_cast<Word>(data[k * kThreads]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (group.has(k)) bits[k] = bit_cast<Word>(data[offsets[k]]);
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void decode(T (&numbers)[kGroup], F number_of) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) numbers[k] = T(number_of(bits[k]));
  }
};

template <class S, class T>
__device__ __forceinline__ void store_numbers(void* output, const Group& group, const T (&numbers)[kGroup]) {
  S* to = static_cast<S*>(output) + group.first;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (group.has(k)) to[k * kThreads] = store<S>(Accumulate<S>(numbers[k]));
  }
}

template <class T>
__device__ __forceinline__ void store_numbers(DType dtype, void* output, const Group& group,
                                              const T (&numbers)[kGroup]) {
  switch (dtype) {
    case DType::Double:
      if constexpr (sizeof(T) == 8) store_numbers<double>(output, group, numbers);
      break;
    case DType::BFloat16:
      store_numbers<bf16>(output, group, numbers);
      break;
    case DType::Half:
      store_numbers<fp16>(output, group, numbers);
      break;
    default:
      store_numbers<float>(output, group, numbers);
  }
}

template <PointwiseResult kResult, class T, class Loss>
__global__ void __launch_bounds__(kThreads, kStridedBlocks<T, Loss>)
    pointwise_strided(Loss loss, const __grid_constant__ CudaPointwiseArgs args,
                      const __grid_constant__ Numbering numbering) {
  auto pass = pass_of<kResult, T>(loss, args);
  const bool weighted = args.weight.data, has_third = takes_third<Loss> && args.third.data;
  const bool upstreams = pass.kTakesUpstream && !args.one_upstream && args.upstream.data;
  constexpr int kOfBlock = kGroup * kThreads;
  Sums<1> sums;  // double across a thread's groups, T within

  for (int64_t first = int64_t(blockIdx.x) * kOfBlock + threadIdx.x; first < args.count;
       first += int64_t(gridDim.x) * kOfBlock) {
    const Group group(first, args.count);
    Numbers<T> inputs, targets, of_weight, of_third, of_upstream;
    inputs.fetch(args.input, numbering, group);
    targets.fetch(args.target, numbering, group);
    if (weighted) of_weight.fetch(args.weight, numbering, group);
    if (has_third) of_third.fetch(args.third, numbering, group);
    if (upstreams) of_upstream.fetch(args.upstream, numbering, group);
    T x[kGroup], t[kGroup], w[kGroup], p[kGroup], g[kGroup], made[kGroup], sum = 0;
    inputs.decode(args.input.dtype, x);
    targets.decode(args.target.dtype, t);
    of_weight.decode(args.weight.dtype, w, weighted);
    of_third.decode(args.third.dtype, p, has_third);
    of_upstream.decode(args.upstream.dtype, g, upstreams);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (!group.has(k)) break;
      made[k] = pass(x[k], t[k], p[k], w[k], g[k], sum);
    }
    sums.values[0] += double(sum);
    if constexpr (pass.kStores) store_numbers(args.output_dtype, args.output, group, made);
  }
  pass.report(args.bad_target);
  if constexpr (pass.kSums) write_total<T>(sums, args);
}

// ---- host side

inline Numbering numbering_of(PointwiseResult result, const CudaPointwiseArgs& args) {
  Numbering numbering = {};
  numbering.dims = args.dims;
  numbering.narrow = args.count <= INT32_MAX && of_operands(result, args, [&](const Operand& from) {
                       int64_t span = 0;
                       for (int d = 0; d < args.dims; ++d) span += (args.sizes[d] - 1) * std::abs(from.strides[d]);
                       return from.dense || span <= INT32_MAX;
                     });
  for (int d = 0; d < args.dims; ++d) {
    const int64_t size = numbering.sizes[d] = args.sizes[d];
    if (numbering.narrow) {
      // By as many bits beyond 31 as the size has, every quotient of a number of 31 bits is exact.
      int& shift = numbering.shifts[d] = 31;
      while (int64_t(1) << (shift - 31) < size) ++shift;
      numbering.inverses[d] = uint64_t(divide_up(int64_t(1) << shift, size));
    } else {
      numbering.inverses[d] = UINT64_MAX / uint64_t(size);
    }
  }
  return numbering;
}

template <class T, class Loss>
int run_strided(const Loss& loss, PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  return with_result<has_target_slope<Loss>, has_third_slope<Loss>, true>(result, [&](auto made) -> int {
    const int sums = Pass<made.value, T, Loss>::kSums ? 1 : 0;
    const Launch how = grid_for(divide_up(args.count, kGroup), kStridedBlocks<T, Loss>, sums);
    return launch(how, stream, pointwise_strided<made.value, T, Loss>, loss, args, numbering_of(result, args));
  });
}

template <template <class> class Functor, class T>
int run_strided_in(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  if (args.third.data && !takes_third<Functor<T>>) {
    if constexpr (has_positive_weight<Functor<T>>)
      return run_strided<T>(typename Functor<T>::WithPositiveWeight(), result, args, stream);
    return cudaErrorInvalidValue;
  }
  return with_specialised<Functor<T>>(args.params, T(),
                                      [&](const auto& loss, T) { return run_strided<T>(loss, result, args, stream); });
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
