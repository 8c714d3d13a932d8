#include "../pointwise.h"

#include <atomic>
#include <cmath>

#include "chunks.h"

namespace fusedloss {
namespace {

CpuPointwise kernel_of(const PointwiseLoss& loss) { return loss.cpu ? loss.cpu : cpu_kernels().pointwise[loss.number]; }

void everywhere(CpuPointwise kernel, PointwiseResult result, const PointwiseArgs& args, int64_t count) {
  parallel_for(count, kElementsOfThread, [&](int64_t begin, int64_t end) { kernel(result, args, begin, end); });
}

// torch's words for probabilities outside [0, 1] and negative variances.
void check_domain(CpuPointwise kernel, const PointwiseArgs& args, int64_t count) {
  std::atomic<bool> input{false}, target{false}, variance{false};
  parallel_for(count, kElementsOfThread, [&](int64_t begin, int64_t end) {
    const double outside = kernel(PointwiseResult::CheckDomain, args, begin, end);
    if (outside == 2) input = true;
    if (outside == 1) target = true;
    if (outside == 3) variance = true;
  });
  TORCH_CHECK_VALUE(!variance, "var has negative entry/entries");
  TORCH_CHECK(!input, "all elements of input should be between 0 and 1");
  TORCH_CHECK(!target, "all elements of target should be between 0 and 1");
}

// How many elements a mean over class indices divides by: those of rows that are not ignored. IndexError for a target
// that is neither a class nor background.
double counted_elements(const PointwiseArgs& args) {
  const int64_t classes = args.sizes[1], rows = args.sizes[0] * args.sizes[2];
  int64_t counted = 0, bad = -1;
  for (int64_t row = 0; row < rows; ++row) {
    const bool counts = args.index[row] != args.ignore_index;
    counted += counts;
    bad = counts && args.index[row] > classes ? row : bad;
  }
  TORCH_CHECK_INDEX(bad < 0, "Target ", args.index[bad], " is out of bounds.");
  return double(counted * classes);
}

double divisor_of(const PointwiseInputs& inputs, const PointwiseArgs& args, int64_t reduction) {
  if (!args.index) return inputs.divisor(reduction);
  const double counted = counted_elements(args);
  return reduction == kMean ? counted : 1.0;
}

struct OnCpu {
  static void forward(const PointwiseLoss& loss, PointwiseInputs& inputs, int64_t reduction, Tensor& value,
                      Tensor* grad) {
    const CpuPointwise kernel = kernel_of(loss);
    const int64_t count = inputs.input.numel();
    PointwiseArgs args = {};
    inputs.fill(args, reduction == kNone ? &value : grad, nullptr);
    const double divisor = divisor_of(inputs, args, reduction);
    const bool has_domain = loss.traits.of_probabilities || loss.traits.of_variances;
    if (reduction == kNone) {
      if (has_domain) check_domain(kernel, args, count);
      return everywhere(kernel, PointwiseResult::Losses, args, count);
    }
    args.scale = 1 / divisor;
    const PointwiseResult result = grad ? PointwiseResult::SumAndGrad : PointwiseResult::Sum;
    const double sum =
        sum_of_chunks(count, [&](int64_t begin, int64_t end) { return kernel(result, args, begin, end); });
    // The loss of what lies outside is NaN.
    if (has_domain && std::isnan(sum)) check_domain(kernel, args, count);
    set_number(value, 0, sum / divisor);
  }

  static void backward(const PointwiseLoss& loss, PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Of of, Tensor& grad) {
    PointwiseArgs args = {};
    inputs.fill(args, &grad, &upstream);
    const Slope slope = slope_of(loss, of);
    args.scale = slope.sign / divisor_of(inputs, args, reduction);
    everywhere(kernel_of(loss), slope.result, args, inputs.input.numel());
  }
};

}  // namespace

void implement_pointwise_on_cpu(torch::Library& m, const PointwiseLoss& loss) { implement_pointwise<OnCpu>(m, loss); }

}  // namespace fusedloss
