#include "../pointwise.h"

#include <ATen/ops/ones.h>

#include "chunks.h"

namespace fusedloss {
namespace {

struct CpuPointwise {
  static void forward(Pointwise loss, const PointwiseInputs& inputs, int64_t reduction, Tensor& value, Tensor* grad) {
    PointwiseArgs args = {};
    inputs.fill(args);
    const int64_t n = inputs.input.numel();
    const CpuKernels& kernels = cpu_kernels();
    if (reduction == kNone) {
      args.output = value.mutable_data_ptr();
      parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { kernels.pointwise_losses(loss, args, begin, end); });
      return;
    }
    Tensor one;
    if (grad) {
      one = at::ones({}, value.options());
      args.output = grad->mutable_data_ptr();
      args.upstream = one.const_data_ptr();
      args.scale = 1 / inputs.divisor(reduction);
    }
    const auto run = [&](int64_t begin, int64_t end) {
      const double sum = kernels.pointwise_sum(loss, args, begin, end);
      if (grad) kernels.pointwise_grad(loss, args, begin, end);  // while the chunk is in the cache
      return sum;
    };
    value.fill_(sum_of_chunks(n, run) / inputs.divisor(reduction));
  }

  static void backward(Pointwise loss, const PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Tensor& grad) {
    PointwiseArgs args = {};
    inputs.fill(args);
    const Upstream read = read_upstream(upstream, inputs.input);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.scale = 1.0 / inputs.divisor(reduction);
    args.output = grad.mutable_data_ptr();
    parallel_for(inputs.input.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { cpu_kernels().pointwise_grad(loss, args, begin, end); });
  }
};

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { fusedloss::implement_pointwise<fusedloss::CpuPointwise>(m); }
