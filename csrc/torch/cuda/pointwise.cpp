#include "../pointwise.h"

#include "common.h"

namespace fusedloss {
namespace {

struct OnCuda {
  static void forward(const PointwiseLoss& loss, PointwiseInputs& inputs, int64_t reduction, Tensor& value,
                      Tensor* grad) {
    TORCH_CHECK(!grad || !inputs.ignore_index, loss.op, ": no gradient in forward over class indices on CUDA");
    if (inputs.ignore_index || loss.traits.of_variances) raise_bad_target();
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
      args.mean_of_counted = args.index && reduction == kMean;
    }
    run(loss, result, inputs, args, call);
  }

  static void backward(const PointwiseLoss& loss, PointwiseInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Of of, Tensor& grad) {
    const CudaCall call(inputs.input);
    CudaPointwiseArgs args = {};
    const Tensor read = inputs.ignore_index ? in_order_of(inputs.input, upstream) : upstream;
    inputs.fill(args, &grad, &read);
    const Slope slope = slope_of(loss, of);
    args.scale = slope.sign / inputs.divisor(reduction);
    Tensor counted;
    if (args.index && reduction == kMean) {
      counted = empty_beside(grad, {}, at::kDouble);
      args.mean_of_counted = true;
      args.counted = counted.mutable_data_ptr<double>();
      args.workspace = call.workspace.mutable_data_ptr();
      check_launch(cuda_indexed_divisor(args, call.stream));
    }
    run(loss, slope.result, inputs, args, call);
  }

 private:
  // The kernels over class indices read an upstream gradient of its own as they read the logits.
  static Tensor in_order_of(const Tensor& input, const Tensor& upstream) {
    if (is_one_value(upstream) || upstream.strides() == input.strides()) return upstream;
    return empty_in_order_of(input, upstream.scalar_type()).copy_(upstream);
  }

  static void run(const PointwiseLoss& loss, PointwiseResult result, PointwiseInputs& inputs, CudaPointwiseArgs& args,
                  const CudaCall& call) {
    args.count = inputs.input.numel();
    args.workspace = call.workspace.mutable_data_ptr();
    if (args.index || loss.traits.of_variances) args.bad_target = bad_target(inputs.input.device().index());
    check_launch(loss.cuda(result, args, call.stream));
  }
};

}  // namespace

void implement_pointwise_on_cuda(torch::Library& m, const PointwiseLoss& loss) { implement_pointwise<OnCuda>(m, loss); }

}  // namespace fusedloss
