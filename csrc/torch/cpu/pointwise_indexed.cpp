#include "../pointwise_indexed.h"

#include "chunks.h"

namespace fusedloss {
namespace {

struct CpuIndexed {
  static void forward(Pointwise loss, const IndexedInputs& inputs, int64_t reduction, Tensor& value) {
    IndexedArgs args = {};
    inputs.fill(args);
    const int64_t kept = rows_kept(args);
    if (reduction == kNone) {
      args.output = value.mutable_data_ptr();
      everywhere(loss, PointwiseResult::Losses, args);
    } else {
      value.fill_(sum(loss, PointwiseResult::Sum, args) / divisor(args, reduction, kept));
    }
  }

  static void backward(Pointwise loss, const IndexedInputs& inputs, const Tensor& upstream, int64_t reduction,
                       Tensor& grad) {
    IndexedArgs args = {};
    inputs.fill(args);
    args.scale = 1 / divisor(args, reduction, rows_kept(args));
    const Upstream read = read_upstream(upstream, inputs.logits);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.output = grad.mutable_data_ptr();
    everywhere(loss, PointwiseResult::Grad, args);
  }

  static void forward_with_grad(Pointwise loss, const IndexedInputs& inputs, int64_t reduction, Tensor& value,
                                Tensor& grad) {
    IndexedArgs args = {};
    inputs.fill(args);
    const double by = divisor(args, reduction, rows_kept(args));
    args.scale = 1 / by;
    args.output = grad.mutable_data_ptr();
    value.fill_(sum(loss, PointwiseResult::SumAndGrad, args) / by);
  }

 private:
  static int64_t rows(const IndexedArgs& args) { return args.layout.outer * args.layout.inner; }
  static int64_t elements(const IndexedArgs& args) { return rows(args) * args.layout.classes; }

  // The rows that are not ignored; IndexError for a target that is neither a class nor background.
  static int64_t rows_kept(const IndexedArgs& args) {
    int64_t kept = 0, bad = -1;
    for (int64_t row = 0; row < rows(args); ++row) {
      const bool keep = args.index[row] != args.ignore_index;
      kept += keep;
      bad = keep && args.index[row] > args.layout.classes ? row : bad;
    }
    TORCH_CHECK_INDEX(bad < 0, "Target ", args.index[bad], " is out of bounds.");
    return kept;
  }

  static double divisor(const IndexedArgs& args, int64_t reduction, int64_t kept) {
    return reduction == kMean ? double(kept * args.layout.classes) : 1.0;
  }

  static double sum(Pointwise loss, PointwiseResult result, const IndexedArgs& args) {
    return sum_of_chunks(elements(args), [&](int64_t begin, int64_t end) {
      return cpu_kernels().indexed(loss, result, args, begin, end);
    });
  }

  static void everywhere(Pointwise loss, PointwiseResult result, const IndexedArgs& args) {
    parallel_for(elements(args), kGrain,
                 [&](int64_t begin, int64_t end) { cpu_kernels().indexed(loss, result, args, begin, end); });
  }
};

template <Pointwise kLoss>
std::tuple<Tensor, Tensor> with_grad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                     int64_t reduction, int64_t ignore_index, Params params) {
  const IndexedInputs inputs(kLoss, logits, target, weight, ignore_index, params);
  check_gradient_in_forward(indexed_name(kLoss), logits, reduction);
  Tensor loss = empty_loss(inputs, reduction), grad = empty_gradient(inputs.logits);
  CpuIndexed::forward_with_grad(kLoss, inputs, reduction, loss, grad);
  return {loss, grad};
}

}  // namespace
}  // namespace fusedloss

#define FUSEDLOSS_WITH_GRAD(name, Functor) \
  m.impl(#name "_indexed_with_grad", &fusedloss::with_grad<fusedloss::Pointwise::name>);

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) {
  fusedloss::implement_indexed<fusedloss::CpuIndexed>(m);
  FUSEDLOSS_INDEXED(FUSEDLOSS_WITH_GRAD)
}
