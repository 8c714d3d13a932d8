#include "../softmax.h"

#include <ATen/ops/ones.h>

#include <algorithm>
#include <vector>

namespace fusedloss {
namespace {

constexpr int64_t kGrain = 32768;  // logits worth waking a thread for

template <class F>
void over_chunks(const SoftmaxLayout& layout, F f) {
  const int64_t rows = softmax_chunk(layout), chunks = (layout.rows + rows - 1) / rows;
  const int64_t grain = (kGrain + rows * layout.classes - 1) / (rows * layout.classes);
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i * rows, std::min(layout.rows, (i + 1) * rows));
  };
  if (chunks == 1) return run(0, 1);
  parallel_for(chunks, grain, run);
}

void set_divisor(Tensor& statistics, double divisor) {
  const int64_t last = statistics.numel() - 1;
  if (statistics.scalar_type() == at::kDouble) {
    statistics.mutable_data_ptr<double>()[last] = divisor;
  } else {
    statistics.mutable_data_ptr<float>()[last] = float(divisor);
  }
}

double divisor_of(const Tensor& statistics) {
  const int64_t last = statistics.numel() - 1;
  return statistics.scalar_type() == at::kDouble ? statistics.const_data_ptr<double>()[last]
                                                 : double(statistics.const_data_ptr<float>()[last]);
}

void check_targets(const SoftmaxArgs& args) {
  for (int64_t row = 0; row < args.logits_layout.rows; ++row) {
    const int64_t y = args.target[row];
    TORCH_CHECK_INDEX(y == args.ignore_index || uint64_t(y) < uint64_t(args.logits_layout.classes), "Target ", y,
                      " is out of bounds.");
  }
}

bool mean_by_weight(Softmax loss) {
  switch (loss) {
#define FUSEDLOSS_TRAIT(name, Functor) \
  case Softmax::name:                  \
    return baseline::Functor<double>::mean_by_weight;
    FUSEDLOSS_SOFTMAX(FUSEDLOSS_TRAIT)
#undef FUSEDLOSS_TRAIT
  }
  TORCH_CHECK(false, "unknown softmax loss ", int64_t(loss));
}

template <class T>
double sum_of_weights(const SoftmaxArgs& args, bool by_weight) {
  const T* weight = by_weight ? static_cast<const T*>(args.weight) : nullptr;
  double sum = 0;
  for (int64_t row = 0; row < args.logits_layout.rows; ++row) {
    if (args.target[row] != args.ignore_index) sum += weight ? double(weight[args.target[row]]) : 1.0;
  }
  return sum;
}

// What a mean divides by, from the targets alone: a gradient made in forward needs it before the last row is read.
double divisor_ahead(Softmax loss, const SoftmaxArgs& args) {
  const bool by_weight = mean_by_weight(loss);
  return args.dtype == DType::Double ? sum_of_weights<double>(args, by_weight) : sum_of_weights<float>(args, by_weight);
}

struct CpuSoftmax {
  static void forward(Softmax loss, const SoftmaxInputs& inputs, int64_t reduction, Tensor& value, Tensor& statistics,
                      Tensor* grad) {
    SoftmaxArgs args = {};
    inputs.fill(args);
    const SoftmaxLayout& layout = args.logits_layout;
    args.losses = reduction == kNone ? value.mutable_data_ptr() : nullptr;
    args.statistics = statistics.mutable_data_ptr();
    const CpuKernels& kernels = cpu_kernels();

    Tensor one;
    if (grad) {
      check_targets(args);
      one = at::ones({}, value.options());
      args.grad = grad->mutable_data_ptr();
      args.grad_layout = *layout_of(*grad);
      args.upstream = one.const_data_ptr();
      args.scale = reduction == kMean ? 1 / divisor_ahead(loss, args) : 1;
    }
    SoftmaxSums total = {0, 0, -1};
    const auto run = [&](int64_t begin, int64_t end) {
      const SoftmaxSums sums = kernels.softmax_forward(loss, args, begin, end);
      if (grad) kernels.softmax_backward(loss, args, begin, end);  // while the chunk is in the cache
      return sums;
    };
    const auto add = [&total](const SoftmaxSums& part) {
      total.loss += part.loss;
      total.weight += part.weight;
      if (total.bad_row < 0) total.bad_row = part.bad_row;
    };
    const int64_t rows = softmax_chunk(layout), chunks = (layout.rows + rows - 1) / rows;
    if (chunks == 1) {
      add(run(0, layout.rows));
    } else {
      std::vector<SoftmaxSums> partial(chunks);
      over_chunks(layout, [&](int64_t i, int64_t begin, int64_t end) { partial[i] = run(begin, end); });
      for (const SoftmaxSums& part : partial) add(part);
    }
    TORCH_CHECK_INDEX(total.bad_row < 0, "Target ", args.target[total.bad_row], " is out of bounds.");
    if (reduction != kNone) value.fill_(reduction == kMean ? total.loss / total.weight : total.loss);
    set_divisor(statistics, reduction == kMean ? total.weight : 1.0);
  }

  static void backward(Softmax loss, const SoftmaxInputs& inputs, const Tensor& upstream, const Tensor& statistics,
                       int64_t, Tensor& grad) {
    SoftmaxArgs args = {};
    inputs.fill(args);
    check_targets(args);
    args.grad = grad.mutable_data_ptr();
    args.grad_layout = *layout_of(grad);
    args.statistics = const_cast<void*>(statistics.const_data_ptr());
    const Upstream read = read_upstream(upstream, inputs.target);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.scale = 1.0 / divisor_of(statistics);
    const CpuKernels& kernels = cpu_kernels();
    over_chunks(args.logits_layout,
                [&](int64_t, int64_t begin, int64_t end) { kernels.softmax_backward(loss, args, begin, end); });
  }
};

}  // namespace
}  // namespace fusedloss

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { fusedloss::implement_softmax<fusedloss::CpuSoftmax>(m); }
