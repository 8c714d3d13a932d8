#include "../distillation_in_place.h"

#include <ATen/ops/ones.h>

#include "common.h"

namespace fusedloss {
namespace {

struct CudaDistillation {
  // A mean's divisor; where the host does not know it, a tensor, which lives as long as the kernels may read it.
  static Tensor set_scale(DistillationArgs& args, const DistillationInputs& inputs) {
    TORCH_CHECK(cuda_distils(args.student.dtype, args.teacher.dtype),
                "kl_divergence: expected a teacher of the student's dtype, or of float32, got ",
                inputs.student.scalar_type(), " and ", inputs.teacher.scalar_type());
    const double of_row = inputs.divisor_of_row();
    if (of_row == 0) return {};
    args.scale = 1 / of_row;
    if (!args.labels && !args.weight) {
      args.scale /= double(args.rows);
      return {};
    }
    Tensor rows = inputs.weight.defined() ? inputs.weight
                                          : at::ones({args.rows}, inputs.student.options().dtype(inputs.arithmetic));
    if (inputs.labels.defined()) rows = rows.masked_fill(inputs.labels.eq(args.ignore_index), 0);
    const Tensor divisor = rows.sum();
    args.divisor = divisor.const_data_ptr();
    return divisor;
  }

  static void forward(DistillationArgs& args, const DistillationInputs& inputs, const Tensor& losses, Tensor& loss) {
    const CudaCall call(inputs.student);
    const Tensor divisor = set_scale(args, inputs);
    if (args.rows > 0) check_launch(cuda_distillation_forward(args, call.stream));
    if (!loss.defined()) return;
    const Tensor sum = losses.sum().mul_(args.scale);
    loss.copy_(divisor.defined() ? sum.div_(divisor) : sum);
  }

  static void backward(DistillationArgs& args, const DistillationInputs& inputs) {
    const CudaCall call(inputs.student);
    const Tensor divisor = set_scale(args, inputs);
    if (args.rows > 0) check_launch(cuda_distillation_backward(args, call.stream));
  }
};

}  // namespace

void implement_distillation_on_cuda(torch::Library& m) {
  implement_distillation<CudaDistillation>(m);
  implement_distillation_in_place<CudaDistillation>(m);
}

}  // namespace fusedloss
