#include "../pointwise.h"

#include "common.h"

namespace fusedloss {
namespace {

struct CudaPointwise {
  static CudaPointwiseArgs args_of(const PointwiseInputs& inputs, int64_t reduction, const CudaCall& call) {
    CudaPointwiseArgs args = {};
    inputs.fill(args);
    args.count = inputs.input.numel();
    args.divisor = inputs.divisor(reduction);
    args.scale = 1.0 / args.divisor;
    args.workspace = call.workspace.mutable_data_ptr();
    return args;
  }

  static void forward(Pointwise loss, const PointwiseInputs& inputs, int64_t reduction, Tensor& value, Tensor* grad) {
    const CudaCall call(inputs.input);
    CudaPointwiseArgs args = args_of(inputs, reduction, call);
    PointwiseResult result = PointwiseResult::Sum;
    if (reduction == kNone) {
      result = PointwiseResult::Losses;
      args.output = value.mutable_data_ptr();
    } else {
      args.total = value.mutable_data_ptr();
      if (grad) {
        result = PointwiseResult::SumAndGrad;
        args.output = grad->mutable_data_ptr();
      }
    }
    check_launch(cuda_pointwise(loss, result, args, call.stream));
  }

  static void backward(Pointwise loss, const PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Tensor& grad) {
    const CudaCall call(inputs.input);
    CudaPointwiseArgs args = args_of(inputs, reduction, call);
    const Upstream read = read_upstream(upstream, inputs.input);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.output = grad.mutable_data_ptr();
    check_launch(cuda_pointwise(loss, PointwiseResult::Grad, args, call.stream));
  }
};

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { fusedloss::implement_pointwise<fusedloss::CudaPointwise>(m); }
