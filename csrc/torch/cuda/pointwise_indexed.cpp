#include "../pointwise_indexed.h"

#include "common.h"

namespace fusedloss {
namespace {

struct CudaIndexed {
  static CudaIndexedArgs args_of(const IndexedInputs& inputs, int64_t reduction, const CudaCall& call) {
    CudaIndexedArgs args = {};
    inputs.fill(args);
    args.mean = reduction == kMean;
    args.scale = 1;
    args.bad_target = bad_target(inputs.logits.device().index());
    args.workspace = call.workspace.mutable_data_ptr();
    return args;
  }

  static void forward(Pointwise loss, const IndexedInputs& inputs, int64_t reduction, Tensor& value) {
    raise_bad_target();
    const CudaCall call(inputs.logits);
    CudaIndexedArgs args = args_of(inputs, reduction, call);
    (reduction == kNone ? args.output : args.total) = value.mutable_data_ptr();
    const PointwiseResult result = reduction == kNone ? PointwiseResult::Losses : PointwiseResult::Sum;
    check_launch(cuda_indexed(loss, result, args, call.stream));
  }

  static void backward(Pointwise loss, const IndexedInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Tensor& grad) {
    const CudaCall call(inputs.logits);
    CudaIndexedArgs args = args_of(inputs, reduction, call);
    const Tensor divisor = at::empty({}, inputs.logits.options().dtype(at::kDouble));
    args.divisor = divisor.mutable_data_ptr<double>();
    if (args.mean) check_launch(cuda_indexed_divisor(args, call.stream));
    const Upstream read = read_upstream(upstream, inputs.logits);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.output = grad.mutable_data_ptr();
    check_launch(cuda_indexed(loss, PointwiseResult::Grad, args, call.stream));
  }
};

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { fusedloss::implement_indexed<fusedloss::CudaIndexed>(m); }
