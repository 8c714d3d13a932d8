#include "../pointwise.h"

#include <atomic>
#include <cmath>

#include "chunks.h"

namespace fusedloss {
namespace {

CpuPointwise kernel_of(const PointwiseLoss& loss) { return loss.cpu ? loss.cpu : cpu_kernels().pointwise[loss.number]; }

void everywhere(CpuPointwise kernel, PointwiseResult result, const PointwiseArgs& args, int64_t count) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) { kernel(result, args, begin, end); });
}

// torch's words for what lies outside [0, 1].
void check_probabilities(CpuPointwise kernel, const PointwiseArgs& args, int64_t count) {
  std::atomic<bool> input{false}, target{false};
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    const double outside = kernel(PointwiseResult::Outside, args, begin, end);
    if (outside == 2) input = true;
    if (outside == 1) target = true;
  });
  TORCH_CHECK(!input, "all elements of input should be between 0 and 1");
  TORCH_CHECK(!target, "all elements of target should be between 0 and 1");
}

struct OnCpu {
  static void forward(const PointwiseLoss& loss, PointwiseInputs& inputs, int64_t reduction, Tensor& value,
                      Tensor* grad) {
    const CpuPointwise kernel = kernel_of(loss);
    const int64_t count = inputs.input.numel();
    PointwiseArgs args = {};
    inputs.fill(args, reduction == kNone ? &value : grad, nullptr);
    if (reduction == kNone) {
      if (loss.traits.of_probabilities) check_probabilities(kernel, args, count);
      return everywhere(kernel, PointwiseResult::Losses, args, count);
    }
    args.scale = 1 / inputs.divisor(reduction);
    const PointwiseResult result = grad ? PointwiseResult::SumAndGrad : PointwiseResult::Sum;
    const double sum =
        sum_of_chunks(count, [&](int64_t begin, int64_t end) { return kernel(result, args, begin, end); });
    // The loss of what is no probability is NaN.
    if (loss.traits.of_probabilities && std::isnan(sum)) check_probabilities(kernel, args, count);
    value.fill_(sum / inputs.divisor(reduction));
  }

  static void backward(const PointwiseLoss& loss, PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       bool of_target, Tensor& grad) {
    PointwiseArgs args = {};
    inputs.fill(args, &grad, &upstream);
    const bool negative = of_target && loss.traits.of_difference;
    args.scale = (negative ? -1 : 1) / inputs.divisor(reduction);
    const PointwiseResult result = of_target && !negative ? PointwiseResult::TargetGrad : PointwiseResult::Grad;
    everywhere(kernel_of(loss), result, args, inputs.input.numel());
  }
};

}  // namespace

void implement_pointwise_on_cpu(torch::Library& m, const PointwiseLoss& loss) { implement_pointwise<OnCpu>(m, loss); }

}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) {
  for (int i = 0; i < fusedloss::kPointwiseLosses; ++i) {
    fusedloss::implement_pointwise_on_cpu(m, fusedloss::pointwise_loss(i));
  }
}
