#include "../pointwise.h"

#include <ATen/ops/ones.h>

#include <algorithm>
#include <vector>

namespace fusedloss {
namespace {

constexpr int64_t kChunk = 16384;       // elements summed on their own: part of the result, not of the machine
constexpr int64_t kGrain = 4 * kChunk;  // elements worth waking a thread for

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
    double sum = 0;
    if (n <= kChunk) {
      sum = run(0, n);
    } else {
      std::vector<double> partial((n + kChunk - 1) / kChunk);
      parallel_for(int64_t(partial.size()), kGrain / kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) partial[i] = run(i * kChunk, std::min(n, (i + 1) * kChunk));
      });
      for (const double part : partial) sum += part;
    }
    value.fill_(sum / inputs.divisor(reduction));
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
