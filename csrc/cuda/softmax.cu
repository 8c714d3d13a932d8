// The entry points of the softmax family: which driver serves a layout, and the divisor of a mean on its own.
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

bool side_by_side(const SoftmaxLayout& layout) { return layout.class_stride == 1 || layout.classes == 1; }

// 8 bytes a row, and those of its weights.
template <class T, class Loss>
__global__ void __launch_bounds__(kThreads) divisor_kernel(Loss loss, CudaSoftmaxArgs args) {
  Sums<1> sums;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < args.logits_layout.rows; row += step) {
    const Target<T> target(loss, args, row);
    sums.values[0] += double(weight_in_mean<Loss>(target, sample_weight_of<T>(args, row)));
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(sums, Workspace(args.workspace), shared, [&](const Sums<1>& total) {
    *static_cast<T*>(args.divisor) = T(reduction_divisor(args.mean, args.zero_for_none, total.values[0]));
  });
}

template <class T, class Loss>
cudaError_t run_divisor(const Loss& loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  constexpr int kRowsOfThread = 8;
  const int64_t blocks = divide_up(args.logits_layout.rows, kRowsOfThread * kThreads);
  const Launch how = {least(blocks, Device().resident_blocks(4)), dim3(kThreads), kWarps * sizeof(double)};
  return launch(how, stream, divisor_kernel<T, Loss>, loss, args);
}

bool by_rows(const CudaSoftmaxArgs& args) {
  return side_by_side(args.logits_layout) && side_by_side(args.probabilities_layout) &&
         (!args.grad || side_by_side(args.grad_layout));
}

// What the loss and its dtype decide for a call.
struct Kind {
  bool reads_row, makes_gradient;
};
Kind kind_of(Softmax loss, const CudaSoftmaxArgs& args) {
  return with_functor(loss, args, [](const auto& functor, auto storage) -> Kind {
    using Loss = std::decay_t<decltype(functor)>;
    return {Loss::reads_row, makes_gradient_of<decltype(storage), Loss>};
  });
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

using namespace FUSEDLOSS_ISA;

int cuda_softmax_divisor(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_functor(loss, args, [&](const auto& functor, auto storage) -> int {
    using Loss = std::decay_t<decltype(functor)>;
    if constexpr (makes_gradient_of<decltype(storage), Loss>) {
      if (!by_rows(args)) return cudaSuccess;
      return run_divisor<Accumulate<decltype(storage)>>(functor, args, stream);
    }
    return cudaSuccess;  // the forward writes the divisor before the backward that follows reads it
  });
}

int cuda_softmax_forward(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const Kind kind = kind_of(loss, args);
  if (!kind.reads_row) return forward_of_targets(loss, args, stream);
  if (args.grad && !(kind.makes_gradient && by_rows(args))) {
    CudaSoftmaxArgs without = args;
    without.grad = nullptr;
    const int error = cuda_softmax_forward(loss, without, stream);
    return error ? error : cuda_softmax_backward(loss, args, stream);
  }
  if (!by_rows(args)) return forward_by_columns(loss, args, stream);
  return fit_tiles(args) ? forward_by_tiles(loss, args, stream) : forward_by_rows(loss, args, stream);
}

int cuda_softmax_backward(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  if (!kind_of(loss, args).reads_row) return backward_of_targets(loss, args, stream);
  if (!by_rows(args)) return backward_by_columns(loss, args, stream);
  return fit_tiles(args) ? backward_by_tiles(loss, args, stream) : backward_by_rows(loss, args, stream);
}

}  // namespace fusedloss
