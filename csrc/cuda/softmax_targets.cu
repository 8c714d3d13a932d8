// Losses that read only the target's logit. One thread for each row reads one logit, and writes one element of a
// gradient that is zero everywhere else.
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

template <class S, class Loss>
__global__ void __launch_bounds__(kThreads) forward_targets(Loss loss, CudaSoftmaxArgs args) {
  using T = Accumulate<S>;
  const SoftmaxLayout& layout = args.logits_layout;
  Finish<S, Loss> finish(loss, args);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < layout.rows; row += step) {
    const Target<T> target(loss, args, row);
    T logit = 0;
    if (target.counts) logit = load(logits_of<S>(args, row)[target.index * layout.class_stride]);
    finish.row(row, target, RowStatistics<T>{}, logit);
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(finish.sums, Workspace(args.workspace), shared, [&](const Sums<2>& totals) { finish.write(totals); });
}

template <class S, class Loss>
__global__ void __launch_bounds__(kThreads) backward_targets(Loss loss, CudaSoftmaxArgs args) {
  using T = Accumulate<S>;
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= args.logits_layout.rows) return;
  const Target<T> target(loss, args, row);
  const Upstreams<T> upstreams = UpstreamReader<S>(args)(row);
  if (!target.counts || !upstreams.has_loss) return;
  S* place = grad_of<S>(args, row) + target.index * args.grad_layout.class_stride;
  *place = store<S>(loss.gradient(target.weight, upstreams.loss));
}

}  // namespace

int forward_of_targets(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  constexpr int kRowsOfThread = 4;
  const int64_t blocks = divide_up(args.logits_layout.rows, kRowsOfThread * kThreads);
  const Launch how = {least(blocks, Device().resident_blocks(8)), dim3(kThreads), 2 * kWarps * sizeof(double)};
  return with_functor(loss, args, [&](const auto& functor, auto storage) -> int {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (!Loss::reads_row) {
      return launch(how, stream, forward_targets<decltype(storage), Loss>, functor, args);
    }
    return cudaErrorInvalidValue;
  });
}

int backward_of_targets(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const Launch how = {divide_up(args.logits_layout.rows, kThreads), dim3(kThreads)};
  return with_functor(loss, args, [&](const auto& functor, auto storage) -> int {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (!Loss::reads_row) {
      return launch(how, stream, backward_targets<decltype(storage), Loss>, functor, args);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
