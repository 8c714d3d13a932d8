// Dense operands of the output's type, read as vectors.
//
// Bytes an element moves, of size s: the sum reads 2s; losses, a gradient, or a sum with its gradient move 3s. A weight
// or an upstream gradient of its own adds s each.
#pragma once

#include "pointwise_pass.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Blocks resident on a multiprocessor: 80 registers a thread, 128 for double.
template <class T>
constexpr int kDenseBlocks = sizeof(T) == 8 ? 2 : 3;

// Vectors of input and of target in flight a thread: 64 bytes. What ptxas makes of the longer losses of half types for
// sm_100 leaves no registers for more than 32.
template <class S, class Loss>
FUSEDLOSS_HD constexpr int dense_unroll() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return sizeof(S) == 2 && !Loss::of_difference ? 1 : 2;
#else
  return 2;
#endif
}

template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<S>)
    pointwise_dense(Loss loss, CudaPointwiseArgs args, Run<S, int64_t> run) {
  using T = Accumulate<S>;
  constexpr int width = Vector<S>::width, unroll = dense_unroll<S, Loss>();
  const auto pass = pass_of<kResult, T>(loss, args);
  const S *input = static_cast<const S*>(args.input.data), *target = static_cast<const S*>(args.target.data);
  const S* weights = static_cast<const S*>(args.weight.data);
  const S* upstreams = pass.kTakesUpstream && !args.one_upstream ? static_cast<const S*>(args.upstream.data) : nullptr;
  S* outputs = static_cast<S*>(args.output);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  Sums<1> sums;  // double across a thread's vectors, T within: 256M float losses keep their digits

  for (int64_t first = thread; first < run.vectors; first += unroll * threads) {
    Vector<S> x[unroll], t[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      x[u] = load_vector(input + run.vector(v));
      t[u] = load_vector(target + run.vector(v));
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
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

// ---- host side

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
  return launch(grid_for(work, kDenseBlocks<S>, sums, args.workspace), stream, pointwise_dense<kResult, S, Loss>, loss,
                args, run);
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA
