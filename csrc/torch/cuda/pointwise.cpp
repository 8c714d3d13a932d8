#include "../pointwise.h"

#include "common.h"

namespace fusedloss {
namespace {

struct OnCuda {
  static void forward(const PointwiseLoss& loss, PointwiseInputs& inputs, int64_t reduction, Tensor& value,
                      Tensor* grad) {
    const CudaCall call(inputs.input);
    CudaPointwiseArgs args = {};
    inputs.fill(args, reduction == kNone ? &value : grad, nullptr);
    args.scale = 1.0 / inputs.divisor(reduction);
    PointwiseResult result = PointwiseResult::Losses;
    if (reduction != kNone) {
      result = grad ? PointwiseResult::SumAndGrad : PointwiseResult::Sum;
      args.total = value.mutable_data_ptr();
      args.total_dtype = *kernel_dtype(value.scalar_type());
      args.divisor = inputs.divisor(reduction);
    }
    run(loss, result, inputs, args, call);
  }

  static void backward(const PointwiseLoss& loss, PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       bool of_target, Tensor& grad) {
    const CudaCall call(inputs.input);
    CudaPointwiseArgs args = {};
    inputs.fill(args, &grad, &upstream);
    const bool negative = of_target && loss.traits.of_difference;
    args.scale = (negative ? -1 : 1) / inputs.divisor(reduction);
    run(loss, of_target && !negative ? PointwiseResult::TargetGrad : PointwiseResult::Grad, inputs, args, call);
  }

 private:
  static void run(const PointwiseLoss& loss, PointwiseResult result, PointwiseInputs& inputs, CudaPointwiseArgs& args,
                  const CudaCall& call) {
    args.count = inputs.input.numel();
    args.workspace = call.workspace.mutable_data_ptr();
    check_launch(loss.cuda(result, args, call.stream));
  }
};

}  // namespace

void implement_pointwise_on_cuda(torch::Library& m, const PointwiseLoss& loss) { implement_pointwise<OnCuda>(m, loss); }

}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) {
  for (int i = 0; i < fusedloss::kPointwiseLosses; ++i) {
    fusedloss::implement_pointwise_on_cuda(m, fusedloss::pointwise_loss(i));
  }
}
