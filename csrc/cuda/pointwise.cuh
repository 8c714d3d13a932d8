// The pointwise driver for any functor. One pass makes any of: the losses, their sum, a gradient, or the last two.
//
// Dense operands of the output's type are read as vectors. Bytes an element moves, of size s: sum 2s; losses, gradient,
// sum and gradient 3s; a weight or an upstream gradient of its own s more.
//
// All others are read one by one, each in its own type and through its own strides. Bytes an element moves: the sizes
// of input, target and output, and of a weight or an upstream gradient of its own; what is broadcast comes from a
// cache. An operand that is not dense costs a division a dimension but the last, by multiplication.
#pragma once

#include <cstdlib>

#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Resident on a multiprocessor: 80 registers a thread, 128 for double.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;

// What is made of an element.
template <PointwiseResult kResult, class T, class Loss>
struct Pass {
  static constexpr bool kSums = kResult == PointwiseResult::Sum || kResult == PointwiseResult::SumAndGrad;
  static constexpr bool kStores = kResult != PointwiseResult::Sum;
  static constexpr bool kTakesUpstream = kResult == PointwiseResult::Grad || kResult == PointwiseResult::TargetGrad;

  const Loss& loss;
  T scale;  // of the gradient: 1 / n for a mean, times the upstream gradient where it is one for all

  // Adds to the sum and returns what is stored.
  __device__ T operator()(T x, T t, T pos_weight, T weight, T upstream, T& sum) const {
    if constexpr (kSums) sum += value_of(loss, x, t, pos_weight) * weight;
    if constexpr (kResult == PointwiseResult::Losses) return value_of(loss, x, t, pos_weight) * weight;
    if constexpr (kResult == PointwiseResult::TargetGrad)
      return grad_target_of(loss, x, t, pos_weight) * scale * upstream * weight;
    if constexpr (kResult == PointwiseResult::Grad || kResult == PointwiseResult::SumAndGrad)
      return grad_of(loss, x, t, pos_weight) * scale * upstream * weight;
    return T(0);
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

// ---- dense operands of one type

constexpr int kUnroll = 2;  // 64 bytes of input and target in flight a thread

template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    pointwise_dense(Loss loss, CudaPointwiseArgs args, Run<S, int64_t> run) {
  using T = Accumulate<S>;
  constexpr int width = Vector<S>::width;
  const auto pass = pass_of<kResult, T>(loss, args);
  const S *input = static_cast<const S*>(args.input.data), *target = static_cast<const S*>(args.target.data);
  const S* weights = static_cast<const S*>(args.weight.data);
  const S* upstreams = pass.kTakesUpstream && !args.one_upstream ? static_cast<const S*>(args.upstream.data) : nullptr;
  S* outputs = static_cast<S*>(args.output);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  Sums<1> sums;  // double across a thread's vectors, T within: 256M float losses keep their digits

  for (int64_t first = thread; first < run.vectors; first += kUnroll * threads) {
    Vector<S> x[kUnroll], t[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      x[u] = load_vector(input + run.vector(v));
      t[u] = load_vector(target + run.vector(v));
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      Vector<S> weight, upstream, output;
      if (weights) weight = load_vector(weights + run.vector(v));
      if (upstreams) upstream = load_vector(upstreams + run.vector(v));
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T w = weights ? load(weight.values[k]) : T(1);
        const T g = upstreams ? load(upstream.values[k]) : T(1);
        output.values[k] = store<S>(pass(load(x[u].values[k]), load(t[u].values[k]), T(1), w, g, sum));
      }
      if constexpr (pass.kStores) store_vector(outputs + run.vector(v), output);
    }
    sums.values[0] += double(sum);
  }

  for (int64_t scalar = thread; scalar < run.scalars(); scalar += threads) {
    const int64_t i = run.scalar(scalar);
    const T w = weights ? load(weights[i]) : T(1);
    const T g = upstreams ? load(upstreams[i]) : T(1);
    T sum = 0;
    const T output = pass(load(input[i]), load(target[i]), T(1), w, g, sum);
    if constexpr (pass.kStores) outputs[i] = store<S>(output);
    sums.values[0] += double(sum);
  }

  if constexpr (pass.kSums) write_total<T>(sums, args);
}

// ---- operands of any type and strides

constexpr int kGroup = 4;  // elements of a thread in flight, each side by side with those of the other threads
// Resident on a multiprocessor: 64 registers a thread, 80 for double or one more operand.
template <class T, class Loss>
constexpr int kGroupBlocks = sizeof(T) == 8 || takes_pos_weight<Loss> ? 3 : 4;

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

// Where an operand has the elements; of those beyond the end, nonsense.
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

// What an operand has for a group, as it lies in memory: the loads of several are under way before the first is waited
// for.
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
__global__ void __launch_bounds__(kThreads, kGroupBlocks<T, Loss>)
    pointwise_strided(Loss loss, const __grid_constant__ CudaPointwiseArgs args,
                      const __grid_constant__ Numbering numbering) {
  const auto pass = pass_of<kResult, T>(loss, args);
  const bool weighted = args.weight.data, positive = takes_pos_weight<Loss>;
  const bool upstreams = pass.kTakesUpstream && !args.one_upstream && args.upstream.data;
  constexpr int kOfBlock = kGroup * kThreads;
  Sums<1> sums;  // as above

  for (int64_t first = int64_t(blockIdx.x) * kOfBlock + threadIdx.x; first < args.count;
       first += int64_t(gridDim.x) * kOfBlock) {
    const Group group(first, args.count);
    Numbers<T> inputs, targets, of_weight, of_pos_weight, of_upstream;
    inputs.fetch(args.input, numbering, group);
    targets.fetch(args.target, numbering, group);
    if (weighted) of_weight.fetch(args.weight, numbering, group);
    if (positive) of_pos_weight.fetch(args.pos_weight, numbering, group);
    if (upstreams) of_upstream.fetch(args.upstream, numbering, group);
    T x[kGroup], t[kGroup], w[kGroup], p[kGroup], g[kGroup], made[kGroup], sum = 0;
    inputs.decode(args.input.dtype, x);
    targets.decode(args.target.dtype, t);
    of_weight.decode(args.weight.dtype, w, weighted);
    of_pos_weight.decode(args.pos_weight.dtype, p, positive);
    of_upstream.decode(args.upstream.dtype, g, upstreams);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (!group.has(k)) break;
      made[k] = pass(x[k], t[k], p[k], w[k], g[k], sum);
    }
    sums.values[0] += double(sum);
    if constexpr (pass.kStores) store_numbers(args.output_dtype, args.output, group, made);
  }
  if constexpr (pass.kSums) write_total<T>(sums, args);
}

// ---- host side

// Calls f with the result as a type; of those that not every functor or dtype has, where it has them.
template <bool kHasTargetGrad, bool kMakesGradInForward, class F>
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
    default:
      return cudaErrorInvalidValue;  // Outside is asked of the CPU alone
  }
}

inline bool has_upstreams(PointwiseResult result, const PointwiseArgs& args) {
  return (result == PointwiseResult::Grad || result == PointwiseResult::TargetGrad) && !args.one_upstream &&
         args.upstream.data;
}

// Whether f holds for every operand that is read by the element.
template <class F>
bool of_operands(PointwiseResult result, const PointwiseArgs& args, F f) {
  const auto holds = [&](const Operand& operand) { return !operand.data || f(operand); };
  return holds(args.input) && holds(args.target) && holds(args.weight) && holds(args.pos_weight) &&
         (!has_upstreams(result, args) || f(args.upstream));
}

inline bool all_dense(PointwiseResult result, const CudaPointwiseArgs& args) {
  const DType dtype = args.input.dtype;
  return result != PointwiseResult::TargetGrad && !args.pos_weight.data &&
         (result == PointwiseResult::Sum || args.output_dtype == dtype) &&
         (args.arithmetic == DType::Double) == (dtype == DType::Double) &&
         of_operands(result, args, [&](const Operand& from) { return from.dense && from.dtype == dtype; });
}

template <PointwiseResult kResult, class S, class Loss>
cudaError_t run_dense(const Loss& loss, const CudaPointwiseArgs& args, CudaStream stream) {
  const bool aligned =
      (kResult == PointwiseResult::Sum || same_alignment(args.input.data, args.output)) &&
      of_operands(kResult, args, [&](const Operand& from) { return same_alignment(args.input.data, from.data); });
  const Run<S, int64_t> run(args.input.data, args.count, aligned);
  const int64_t work = run.vectors > run.scalars() ? run.vectors : run.scalars();
  const int sums = Pass<kResult, Accumulate<S>, Loss>::kSums ? 1 : 0;
  return launch(grid_for(work, kBlocks<S>, sums, args.workspace), stream, pointwise_dense<kResult, S, Loss>, loss, args,
                run);
}

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
  return with_result<has_target_slope<Loss>, true>(result, [&](auto made) -> int {
    const int sums = Pass<made.value, T, Loss>::kSums ? 1 : 0;
    const Launch how = grid_for(divide_up(args.count, kGroup), kGroupBlocks<T, Loss>, sums, args.workspace);
    return launch(how, stream, pointwise_strided<made.value, T, Loss>, loss, args, numbering_of(result, args));
  });
}

template <template <class> class Functor, class T>
int run_strided_in(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  if (args.pos_weight.data) {
    if constexpr (has_positive_weight<Functor<T>>)
      return run_strided<T>(typename Functor<T>::WithPositiveWeight(), result, args, stream);
    return cudaErrorInvalidValue;
  }
  return with_twin<Functor<T>>(args.params, T(),
                               [&](const auto& loss, T) { return run_strided<T>(loss, result, args, stream); });
}

template <template <class> class Functor>
int run_pointwise(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  if (all_dense(result, args)) {
    return with_storage(args.input.dtype, [&](auto storage) -> int {
      using S = decltype(storage);
      return with_twin<Functor<Accumulate<S>>>(args.params, storage, [&](const auto& loss, S) -> int {
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
