#include "../row_sums.h"

#include "common.h"

namespace fusedloss {
namespace {

struct RowSumsOnCuda {
  static void forward(const RowSumsLoss& loss, const RowSumsInputs& inputs, int64_t reduction, Tensor& value) {
    if (loss.traits.takes_class) raise_bad_target();
    const CudaCall call(inputs.operands[0]);
    CudaRowSumsArgs args = {};
    fill(args, loss, inputs, call);
    if (reduction == kNone) {
      args.losses = value.mutable_data_ptr();
    } else {
      args.total = value.mutable_data_ptr();
      args.divisor = inputs.divisor(reduction);
    }
    check_launch(cuda_row_sums_forward(loss.kernel(), args, call.stream));
  }

  static void backward(const RowSumsLoss& loss, const RowSumsInputs& inputs, const Tensor& upstream, int64_t reduction,
                       const RowGradients& gradients) {
    const CudaCall call(inputs.operands[0]);
    CudaRowSumsArgs args = {};
    fill(args, loss, inputs, call);
    fill_gradients(args, gradients);
    const Upstream read = read_upstream(upstream);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.scale = 1 / inputs.divisor(reduction);
    check_launch(cuda_row_sums_backward(loss.kernel(), args, call.stream));
  }

 private:
  static void fill(CudaRowSumsArgs& args, const RowSumsLoss& loss, const RowSumsInputs& inputs, const CudaCall& call) {
    inputs.fill(args);
    args.workspace = call.workspace.mutable_data_ptr();
    if (loss.traits.takes_class) args.bad_target = bad_target(inputs.operands[0].device().index());
  }
};

}  // namespace

void implement_row_sums_on_cuda(torch::Library& m, const RowSumsLoss& loss) {
  implement_row_sums<RowSumsOnCuda>(m, loss);
}

}  // namespace fusedloss
