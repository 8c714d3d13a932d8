// The entry points of the softmax family: which driver serves a layout, and the divisor of a mean on its own.
#include "softmax.cuh"

namespace fusedloss::FUSEDLOSS_ISA {
namespace {

bool side_by_side(const SoftmaxLayout& layout) { return layout.class_stride == 1 || layout.classes == 1; }

// 8 bytes a row, and those of its weight.
template <class T>
__global__ void __launch_bounds__(kThreads) divisor_kernel(CudaSoftmaxArgs args, bool by_weight) {
  Sums<1> sums;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < args.logits_layout.rows; row += step) {
    const Target<T> target(args, row);
    if (target.counts()) sums.values[0] += by_weight ? double(target.weight) : 1.0;
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sum_of_grid(sums, Workspace(args.workspace), shared,
              [&](const Sums<1>& total) { *static_cast<T*>(args.divisor) = T(total.values[0]); });
}

template <class T>
cudaError_t run_divisor(const CudaSoftmaxArgs& args, bool by_weight, CudaStream stream) {
  constexpr int kRowsOfThread = 8;
  const int64_t blocks = divide_up(args.logits_layout.rows, kRowsOfThread * kThreads);
  const Launch how = {least(blocks, Device().resident_blocks(4)), dim3(kThreads), kWarps * sizeof(double), 1,
                      Workspace(args.workspace).counter};
  return launch(how, stream, divisor_kernel<T>, args, by_weight);
}

}  // namespace
}  // namespace fusedloss::FUSEDLOSS_ISA

namespace fusedloss {

using namespace FUSEDLOSS_ISA;

int cuda_softmax_divisor(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  return with_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) -> int {
    constexpr bool by_weight = std::remove_reference_t<decltype(functor)>::mean_by_weight;
    return run_divisor<Accumulate<decltype(storage)>>(args, by_weight, stream);
  });
}

int cuda_softmax_forward(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const bool rows = side_by_side(args.logits_layout) && (!args.grad || side_by_side(args.grad_layout));
  return rows ? forward_by_rows(loss, args, stream) : forward_by_columns(loss, args, stream);
}

int cuda_softmax_backward(Softmax loss, const CudaSoftmaxArgs& args, CudaStream stream) {
  const bool rows = side_by_side(args.logits_layout) && side_by_side(args.grad_layout);
  return rows ? backward_by_rows(loss, args, stream) : backward_by_columns(loss, args, stream);
}

}  // namespace fusedloss
