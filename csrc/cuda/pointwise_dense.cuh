// Dense operands of the output's type, read as vectors. Beside a weight of the positive term, factors of the loss may
// also be those of each place of the innermost dimension.
//
// Bytes an element moves, of size s: the sum reads 2s; losses, a gradient, or a sum with its gradient move 3s. A factor
// or an upstream gradient of its own adds s each; factors that repeat come from a cache.
#pragma once

#include "pointwise_pass.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Blocks resident on a multiprocessor: 80 registers a thread, 128 for double and long formulas.
template <class T, class Loss>
constexpr int kDenseBlocks = sizeof(T) == 8 || is_long<Loss> ? 2 : 3;

// Vectors of input and of target in flight a thread: 64 bytes. What ptxas makes of the longer losses of half types for
// sm_100, and of those of float16 one by one for sm_90, leaves no registers for more than 32.
template <PointwiseResult kResult, class S, class Loss>
FUSEDLOSS_HD constexpr int dense_unroll() {
  if (is_long<Loss>) return 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return sizeof(S) == 2 && !Loss::of_difference ? 1 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return std::is_same_v<S, fp16> && kResult == PointwiseResult::Losses && !Loss::of_difference ? 1 : 2;
#else
  return 2;
#endif
}

// A vector that has been read, of halves as bits: put together one by one they would take an instruction each.
template <class S>
using Kept = std::conditional_t<sizeof(S) == 2, typename Vector<S>::Bits, Vector<S>>;

// The numbers of a vector, ones where there is none.
template <class S, class T = Accumulate<S>, int kCount = Vector<S>::width>
__device__ void read_or_ones(const S* from, int64_t i, T (&numbers)[kCount]) {
  if constexpr (sizeof(S) == 2) {
    Vector<S> ones;
#pragma unroll
    for (S& one : ones.values) one = one_of<S>();
    auto kept = bit_cast<Kept<S>>(ones);
    if (from) kept = load_bits<Kept<S>>(from + i);
    unpack(bit_cast<Vector<S>>(kept), numbers);
  } else {
    Vector<S> vector;
    if (from) vector = load_vector(from + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) numbers[k] = from ? load(vector.values[k]) : T(1);
  }
}

// After how many elements factors of the loss repeat; 0: they do not.
struct Periods {
  uint32_t weight, third;
};

// A factor of the loss: 1 where data is null, and number i % period of data where it repeats. That is for losses with a
// weight of the positive term, which is nearly always one for each class; others lack the registers.
template <class S, class Loss>
struct Factors {
  const S* data;
  uint32_t period;

  // Whole vectors where it repeats, of which none goes beyond the period.
  __device__ void read(int64_t first, Accumulate<S> (&numbers)[Vector<S>::width]) const {
    read_or_ones(data, place(first), numbers);
  }
  __device__ Accumulate<S> operator[](int64_t i) const { return data ? load(data[place(i)]) : Accumulate<S>(1); }

 private:
  __device__ int64_t place(int64_t i) const {
    if (!takes_third<Loss> || period == 0) return i;
    return i <= UINT32_MAX ? uint32_t(i) % period : i % period;
  }
};

template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<S, Loss>)
    pointwise_dense(Loss loss, CudaPointwiseArgs args, Run<S, int64_t> run, Periods periods) {
  using T = Accumulate<S>;
  constexpr int width = Vector<S>::width, unroll = dense_unroll<kResult, S, Loss>();
  auto pass = pass_of<kResult, T>(loss, args);
  const S *input = static_cast<const S*>(args.input.data), *target = static_cast<const S*>(args.target.data);
  const Factors<S, Loss> weights = {static_cast<const S*>(args.weight.data), periods.weight};
  const Factors<S, Loss> thirds = {static_cast<const S*>(args.third.data), periods.third};
  const S* upstreams = pass.kTakesUpstream && !args.one_upstream ? static_cast<const S*>(args.upstream.data) : nullptr;
  S* outputs = static_cast<S*>(args.output);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  Sums<1> sums;  // double across a thread's vectors, T within: 256M float losses keep their digits

  for (int64_t first = thread; first < run.vectors; first += unroll * threads) {
    Kept<S> inputs[unroll], targets[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      inputs[u] = load_bits<Kept<S>>(input + run.vector(v));
      targets[u] = load_bits<Kept<S>>(target + run.vector(v));
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      T x[width], t[width], w[width], p[width] = {}, g[width] = {}, made[width];
      weights.read(run.vector(v), w);
      if constexpr (takes_third<Loss>) thirds.read(run.vector(v), p);
      if constexpr (pass.kTakesUpstream) read_or_ones(upstreams, run.vector(v), g);
      unpack(bit_cast<Vector<S>>(inputs[u]), x);
      unpack(bit_cast<Vector<S>>(targets[u]), t);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        made[k] = pass(x[k], t[k], p[k], w[k], pass.kTakesUpstream ? g[k] : T(1), sum);
      }
      if constexpr (pass.kStores) store_vector(outputs + run.vector(v), pack<S>(made));
    }
    sums.values[0] += double(sum);
  }

#pragma unroll 1
  for (int64_t scalar = thread; scalar < run.scalars(); scalar += threads) {
    const int64_t i = run.scalar(scalar);
    T p = 1;
    if constexpr (takes_third<Loss>) p = thirds[i];
    const T w = weights[i], g = upstreams ? load(upstreams[i]) : T(1);
    T sum = 0;
    const T output = pass(load(input[i]), load(target[i]), p, w, g, sum);
    if constexpr (pass.kStores) outputs[i] = store<S>(output);
    sums.values[0] += double(sum);
  }

  pass.report(args.bad_target);
  if constexpr (pass.kSums) write_total<T>(sums, args);
}

// ---- host side

// Whether a factor is one number for each place of the innermost dimension, read by whole vectors of `width`.
inline bool repeats(const Operand& from, const CudaPointwiseArgs& args, int64_t width) {
  if (!from.data || from.dense || from.strides[0] != 1 || args.sizes[0] % width != 0 || args.sizes[0] > UINT32_MAX)
    return false;
  for (int d = 1; d < args.dims; ++d) {
    if (from.strides[d] != 0) return false;
  }
  return same_alignment(from.data, nullptr) && same_alignment(args.input.data, nullptr);
}

inline int64_t width_of(DType dtype) { return dtype == DType::Double ? 2 : dtype == DType::Float ? 4 : 8; }

inline bool all_dense(PointwiseResult result, const CudaPointwiseArgs& args) {
  const DType dtype = args.input.dtype;
  const auto fits = [&](const Operand& from) {
    const bool is_factor = args.third.data && (&from == &args.weight || &from == &args.third);
    return from.dtype == dtype && (from.dense || (is_factor && repeats(from, args, width_of(dtype))));
  };
  const bool strided_alone = result == PointwiseResult::TargetGrad || result == PointwiseResult::ThirdGrad;
  return !strided_alone && (result == PointwiseResult::Sum || args.output_dtype == dtype) &&
         (args.arithmetic == DType::Double) == (dtype == DType::Double) && of_operands(result, args, fits);
}

// Whether all operands and the output have their vectors at the same elements. Where they do not, the strided kernel
// reads four elements a thread at once, and this one would read one.
inline bool begin_alike(PointwiseResult result, const CudaPointwiseArgs& args) {
  return (result == PointwiseResult::Sum || same_alignment(args.input.data, args.output)) &&
         of_operands(result, args, [&](const Operand& from) { return same_alignment(args.input.data, from.data); });
}

template <PointwiseResult kResult, class S, class Loss>
cudaError_t run_dense(const Loss& loss, const CudaPointwiseArgs& args, CudaStream stream) {
  const auto period = [&](const Operand& from) {
    return repeats(from, args, Vector<S>::width) ? uint32_t(args.sizes[0]) : 0;
  };
  const Run<S, int64_t> run(args.input.data, args.count, true);
  const int64_t work = run.vectors > run.scalars() ? run.vectors : run.scalars();
  const int sums = Pass<kResult, Accumulate<S>, Loss>::kSums ? 1 : 0;
  return launch(grid_for(work, kDenseBlocks<S, Loss>, sums), stream, pointwise_dense<kResult, S, Loss>, loss, args, run,
                Periods{period(args.weight), period(args.third)});
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
