#include "../softmax.h"

#include "common.h"

namespace fusedloss {
namespace {

struct CudaSoftmax {
  static CudaSoftmaxArgs args_of(const SoftmaxInputs& inputs, int64_t reduction, const Tensor& statistics,
                                 const CudaCall& call) {
    CudaSoftmaxArgs args = {};
    inputs.fill(args);
    args.mean = reduction == kMean;
    args.statistics = const_cast<void*>(statistics.const_data_ptr());
    const int64_t divisor = (statistics.numel() - 1) * statistics.element_size();
    args.divisor = static_cast<char*>(args.statistics) + divisor;
    args.bad_target = bad_target(inputs.logits.device().index());
    args.workspace = call.workspace.mutable_data_ptr();
    return args;
  }

  static void forward(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction, Tensor& value, Tensor& statistics,
                      Tensor* grad) {
    raise_bad_target();
    const CudaCall call(inputs.logits);
    CudaSoftmaxArgs args = args_of(inputs, reduction, statistics, call);
    (reduction == kNone ? args.losses : args.total) = value.mutable_data_ptr();
    if (grad) {
      if (args.mean) check_launch(cuda_softmax_divisor(loss, args, call.stream));
      args.grad = grad->mutable_data_ptr();
      args.grad_layout = *layout_of(*grad);
      args.in_place = args.grad == args.logits;
    }
    check_launch(cuda_softmax_forward(loss, args, call.stream));
  }

  static void backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream, const Tensor& statistics,
                       int64_t reduction, Tensor& grad) {
    const CudaCall call(inputs.logits);
    CudaSoftmaxArgs args = args_of(inputs, reduction, statistics, call);
    args.grad = grad.mutable_data_ptr();
    args.grad_layout = *layout_of(grad);
    args.in_place = args.grad == args.logits;
    const Upstream read = read_upstream(upstream, inputs.target);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    check_launch(cuda_softmax_backward(loss, args, call.stream));
  }
};

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { fusedloss::implement_softmax<fusedloss::CudaSoftmax>(m); }
