#include "../softmax.h"

#include "common.h"

namespace fusedloss {
namespace {

CudaSoftmax cuda_kernels_of(const SoftmaxLoss& loss) {
  if (loss.custom) return loss.custom->cuda;
  return {cuda_softmax_divisor, cuda_softmax_forward, cuda_softmax_backward};
}

struct SoftmaxOnCuda {
  static CudaSoftmaxArgs args_of(const SoftmaxInputs& inputs, int64_t reduction, const Tensor& statistics,
                                 const CudaCall& call) {
    CudaSoftmaxArgs args = {};
    inputs.fill(args);
    args.mean = is_mean(reduction);
    args.zero_for_none = reduction == kMeanOrZero;
    args.statistics = const_cast<void*>(statistics.const_data_ptr());
    const int64_t divisor = (statistics.numel() - 1) * statistics.element_size();
    args.divisor = static_cast<char*>(args.statistics) + divisor;
    args.bad_target = bad_target(inputs.logits.device().index());
    args.workspace = call.workspace.mutable_data_ptr();
    return args;
  }

  static void write_to(Tensor& grad, CudaSoftmaxArgs& args) {
    args.grad = grad.mutable_data_ptr();
    args.grad_layout = *layout_of(grad);
    args.in_place = args.grad == args.logits;
  }

  static void forward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction, SoftmaxResults& results,
                      Tensor* grad) {
    raise_bad_target();
    const CudaCall call(inputs.logits);
    CudaSoftmaxArgs args = args_of(inputs, reduction, results.statistics, call);
    (reduction == kNone ? args.losses : args.total) = results.loss.mutable_data_ptr();
    if (inputs.second) args.second = results.second.mutable_data_ptr();
    if (grad) {
      if (args.mean) check_launch(cuda_kernels_of(loss).divisor(loss.kernel(), args, call.stream));
      write_to(*grad, args);
    }
    check_launch(cuda_kernels_of(loss).forward(loss.kernel(), args, call.stream));
  }

  static void backward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                       const OptionalTensor& upstream_second, const Tensor& statistics, int64_t reduction,
                       Tensor& grad) {
    const CudaCall call(inputs.logits);
    CudaSoftmaxArgs args = args_of(inputs, reduction, statistics, call);
    write_to(grad, args);
    if (!loss.traits.reads_row) grad.zero_();
    const Upstream read = read_upstream(upstream);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    Upstream second;
    if (upstream_second) {
      second = read_upstream(*upstream_second);
      args.upstream_second = second.tensor.const_data_ptr();
      args.upstream_second_stride = second.stride;
    }
    check_launch(cuda_kernels_of(loss).backward(loss.kernel(), args, call.stream));
  }
};

}  // namespace
void implement_softmax_on_cuda(torch::Library& m, const SoftmaxLoss& loss) {
  implement_softmax<SoftmaxOnCuda>(m, loss);
}

}  // namespace fusedloss
