// The pointwise driver for any functor. One pass makes any of: the losses, their sum, the gradient, or the last two.
//
// Bytes an element moves, of size s: sum 2s; losses, gradient, sum and gradient 3s; a weight or an upstream gradient of
// its own s more.
#include "common.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

// Resident on a multiprocessor: 80 registers a thread, 128 for double.
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 2 : 3;
constexpr int kUnroll = 2;  // 64 bytes of input and target in flight a thread

template <PointwiseResult kResult, class S, class Loss>
struct Element {
  using T = Accumulate<S>;
  static constexpr bool kSums = kResult == PointwiseResult::Sum || kResult == PointwiseResult::SumAndGrad;
  static constexpr bool kGrads = kResult == PointwiseResult::Grad || kResult == PointwiseResult::SumAndGrad;
  static constexpr bool kStores = kResult != PointwiseResult::Sum;

  const Loss& loss;
  const CudaPointwiseArgs& args;
  T scale;  // of the gradient: 1 / n for a mean, times the upstream gradient where it is one for all

  __device__ const S* input() const { return static_cast<const S*>(args.input); }
  __device__ const S* target() const { return static_cast<const S*>(args.target); }
  __device__ const S* weight() const { return static_cast<const S*>(args.weight); }
  __device__ const S* upstream() const {
    return kResult == PointwiseResult::Grad && args.upstream_stride ? static_cast<const S*>(args.upstream) : nullptr;
  }
  __device__ S* output() const { return static_cast<S*>(args.output); }

  // Adds to the sum and returns what is stored.
  __device__ T operator()(T x, T t, T w, T g, T& sum) const {
    if constexpr (kSums) sum += loss.value(x, t) * w;
    if constexpr (kGrads) return loss.grad(x, t) * scale * g * w;
    if constexpr (kResult == PointwiseResult::Losses) return loss.value(x, t) * w;
    return T(0);
  }
};

template <PointwiseResult kResult, class S, class Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    pointwise_kernel(Loss loss, CudaPointwiseArgs args, Run<S, int64_t> run) {
  using T = Accumulate<S>;
  using Elements = Element<kResult, S, Loss>;
  constexpr int width = Vector<S>::width;
  T scale = T(args.scale);
  if (kResult == PointwiseResult::Grad && args.upstream_stride == 0)
    scale *= load(*static_cast<const S*>(args.upstream));
  const Elements element = {loss, args, scale};
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  Sums<1> sums;  // double across a thread's vectors, T within: 256M float losses keep their digits

  for (int64_t first = thread; first < run.vectors; first += kUnroll * threads) {
    Vector<S> x[kUnroll], t[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      x[u] = load_vector(element.input() + run.vector(v));
      t[u] = load_vector(element.target() + run.vector(v));
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * threads;
      if (v >= run.vectors) break;
      Vector<S> weight, upstream, output;
      if (element.weight()) weight = load_vector(element.weight() + run.vector(v));
      if (element.upstream()) upstream = load_vector(element.upstream() + run.vector(v));
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T w = element.weight() ? load(weight.values[k]) : T(1);
        const T g = element.upstream() ? load(upstream.values[k]) : T(1);
        output.values[k] = store<S>(element(load(x[u].values[k]), load(t[u].values[k]), w, g, sum));
      }
      if constexpr (Elements::kStores) store_vector(element.output() + run.vector(v), output);
    }
    sums.values[0] += double(sum);
  }

  for (int64_t scalar = thread; scalar < run.scalars(); scalar += threads) {
    const int64_t i = run.scalar(scalar);
    const T w = element.weight() ? load(element.weight()[i]) : T(1);
    const T g = element.upstream() ? load(element.upstream()[i]) : T(1);
    T sum = 0;
    const T output = element(load(element.input()[i]), load(element.target()[i]), w, g, sum);
    if constexpr (Elements::kStores) element.output()[i] = store<S>(output);
    sums.values[0] += double(sum);
  }

  if constexpr (Elements::kSums) {
    double* shared = reinterpret_cast<double*>(shared_memory());
    sum_of_grid(sums, Workspace(args.workspace), shared, [&](const Sums<1>& total) {
      *static_cast<S*>(args.total) = store<S>(T(total.values[0] / args.divisor));
    });
  }
}

template <PointwiseResult kResult, class S, class Loss>
cudaError_t run_kernel(const Loss& loss, const CudaPointwiseArgs& args, CudaStream stream) {
  const bool aligned = same_alignment(args.input, args.target) &&
                       (!args.weight || same_alignment(args.input, args.weight)) &&
                       (!args.output || same_alignment(args.input, args.output)) &&
                       (!args.upstream_stride || same_alignment(args.input, args.upstream));
  const Run<S, int64_t> run(args.input, args.count, aligned);
  const int64_t work = run.vectors > run.scalars() ? run.vectors : run.scalars();
  const Launch how = grid_for(work, kBlocks<S>, Element<kResult, S, Loss>::kSums ? 1 : 0, args.workspace);
  return launch(how, stream, pointwise_kernel<kResult, S, Loss>, loss, args, run);
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

int cuda_pointwise(Pointwise loss, PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {
  using namespace FUSEDLOSS_ISA;
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) -> int {
    using S = decltype(storage);
    switch (result) {
      case PointwiseResult::Losses:
        return run_kernel<PointwiseResult::Losses, S>(functor, args, stream);
      case PointwiseResult::Sum:
        return run_kernel<PointwiseResult::Sum, S>(functor, args, stream);
      case PointwiseResult::SumAndGrad:
        if constexpr (makes_gradient_in_forward<S>) {
          return run_kernel<PointwiseResult::SumAndGrad, S>(functor, args, stream);
        }
        return cudaErrorInvalidValue;
      default:
        return run_kernel<PointwiseResult::Grad, S>(functor, args, stream);
    }
  });
}

}  // namespace fusedloss
