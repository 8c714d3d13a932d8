#include <algorithm>
#include <vector>

#include "../softmax.h"
#include "scratch.h"

namespace fusedloss {
namespace {

constexpr int64_t kNumbersOfThread = 32768;  // numbers to read that are worth waking a thread for, to the nearest chunk
constexpr size_t kStreamed = 16 << 20;       // bytes of a gradient that no cache keeps until it is read
constexpr int64_t kFewRows = 32;             // up to here long rows are cut into parts, so that every thread has work
// Where other processes hold the cores, the second half of a row waits for its thread for a time slice, milliseconds.
// So a row is cut only where each half takes 100 us.
constexpr int64_t kNumbersOfCutRow = 8 * kSoftmaxPart;

// The rows of a chunk, for a pass that reads `work` numbers of each.
int64_t rows_of_chunk(SoftmaxLayout layout, int64_t work) {
  layout.classes = work;
  return softmax_chunk(layout);
}

// Calls f(number of chunk, first row, last row); it reads `work` numbers a row.
template <class F>
void over_chunks(const SoftmaxLayout& layout, int64_t work, F f) {
  const int64_t rows = rows_of_chunk(layout, work), chunks = (layout.rows + rows - 1) / rows;
  const int64_t grain = std::max<int64_t>(1, (kNumbersOfThread + rows * work / 2) / (rows * work));
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i * rows, std::min(layout.rows, (i + 1) * rows));
  };
  if (chunks == 1) return run(0, 1);
  parallel_for(chunks, grain, run);
}

bool cuts_rows(const SoftmaxArgs& args) {
  const SoftmaxLayout& layout = args.logits_layout;
  return layout.rows <= kFewRows && layout.classes >= 2 * kSoftmaxPart &&
         layout.rows * layout.classes >= 2 * kNumbersOfCutRow && layout.class_stride == 1 &&
         args.probabilities_layout.class_stride == 1;
}

// Calls f(row, part, number of both) on every part of every row.
template <class F>
void over_parts(const SoftmaxLayout& layout, F f) {
  const int64_t parts = (layout.classes + kSoftmaxPart - 1) / kSoftmaxPart;
  parallel_for(layout.rows * parts, kNumbersOfCutRow / kSoftmaxPart, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i / parts, i % parts, i);
  });
}

CpuSoftmax cpu_kernels_of(const SoftmaxLoss& loss) {
  if (loss.custom) return loss.custom->cpu;
  const CpuKernels& listed = cpu_kernels();
  return {listed.softmax_forward, listed.softmax_backward, listed.softmax_with_grad, listed.softmax_part,
          listed.softmax_backward_part};
}

double divisor_from(double weight, int64_t reduction) {
  return baseline::reduction_divisor(is_mean(reduction), reduction == kMeanOrZero, weight);
}

void check_bad_row(const SoftmaxArgs& args, int64_t row) {
  TORCH_CHECK_INDEX(row < 0, "Target ", target_of(args, std::max<int64_t>(row, 0)), " is out of bounds.");
}

// The sums of every chunk, added in order.
template <class F>
SoftmaxSums sum_chunks(const SoftmaxLayout& layout, int64_t work, F f) {
  const int64_t rows = rows_of_chunk(layout, work), chunks = (layout.rows + rows - 1) / rows;
  if (chunks == 1) return f(0, layout.rows);
  std::vector<SoftmaxSums> partial(chunks);
  over_chunks(layout, work, [&](int64_t i, int64_t begin, int64_t end) { partial[i] = f(begin, end); });
  SoftmaxSums total = {0, 0, -1};
  for (const SoftmaxSums& part : partial) {
    total.loss += part.loss;
    total.weight += part.weight;
    if (total.bad_row < 0) total.bad_row = part.bad_row;
  }
  return total;
}

// Before anything is written. Returns what a mean divides by, which a gradient made in forward needs before the last
// row is read.
double check_targets(const SoftmaxLoss& loss, const SoftmaxArgs& args) {
  const bool by_weight = loss.traits.mean_by_weight;
  const SoftmaxSums sums = sum_chunks(args.logits_layout, 1, [&](int64_t begin, int64_t end) {
    return cpu_kernels().softmax_targets(args, by_weight, begin, end);
  });
  check_bad_row(args, sums.bad_row);
  return sums.weight;
}

void run_backward(const SoftmaxLoss& loss, const SoftmaxArgs& args) {
  const CpuSoftmax kernels = cpu_kernels_of(loss);
  // In place, a part would overwrite the target's logit before another has read it.
  if (cuts_rows(args) && args.grad_layout.class_stride == 1 && args.grad != args.logits) {
    over_parts(args.logits_layout,
               [&](int64_t row, int64_t part, int64_t) { kernels.backward_part(loss.kernel(), args, row, part); });
  } else {
    over_chunks(args.logits_layout, args.logits_layout.classes,
                [&](int64_t, int64_t begin, int64_t end) { kernels.backward(loss.kernel(), args, begin, end); });
  }
}

void set_gradient(SoftmaxArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_layout = *layout_of(grad);
  args.streams = grad.nbytes() >= kStreamed && args.grad != args.logits;
}

Scratch scratch_for(const SoftmaxArgs& args) {
  const bool wanted = args.grad && args.dtype == DType::BFloat16;
  return Scratch(wanted ? sizeof(float) * softmax_scratch(args.logits_layout.classes) : 0);
}

struct SoftmaxOnCpu {
  static void forward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, int64_t reduction, SoftmaxResults& results,
                      Tensor* grad) {
    SoftmaxArgs args = {};
    inputs.fill(args);
    args.losses = reduction == kNone ? results.loss.mutable_data_ptr() : nullptr;
    args.second = inputs.second ? results.second.mutable_data_ptr() : nullptr;
    args.statistics = results.statistics.mutable_data_ptr();

    if (grad) {
      set_gradient(args, *grad);
      args.scale = 1 / divisor_from(check_targets(loss, args), reduction);
    }
    const SoftmaxSums total = loss.traits.reads_row && cuts_rows(args) ? of_parts(loss, args) : of_chunks(loss, args);
    check_bad_row(args, total.bad_row);
    const double divisor = divisor_from(total.weight, reduction);
    if (reduction != kNone) set_number(results.loss, 0, total.loss / divisor);
    set_number(results.statistics, results.statistics.numel() - 1, divisor);
  }

  static SoftmaxSums of_chunks(const SoftmaxLoss& loss, const SoftmaxArgs& args) {
    const CpuSoftmax kernels = cpu_kernels_of(loss);
    const int64_t work = loss.traits.reads_row ? args.logits_layout.classes : 1;
    const Scratch scratch = scratch_for(args);
    return sum_chunks(args.logits_layout, work, [&](int64_t begin, int64_t end) {
      SoftmaxSums sums = {0, 0, -1};
      if (args.grad && kernels.with_grad(loss.kernel(), args, begin, end, scratch.get(), &sums)) return sums;
      sums = kernels.forward(loss.kernel(), args, nullptr, begin, end);
      if (args.grad) kernels.backward(loss.kernel(), args, begin, end);  // while the chunk is in the cache
      return sums;
    });
  }

  static SoftmaxSums of_parts(const SoftmaxLoss& loss, const SoftmaxArgs& args) {
    check_targets(loss, args);
    const CpuSoftmax kernels = cpu_kernels_of(loss);
    const SoftmaxLayout& layout = args.logits_layout;
    std::vector<SoftmaxPart> parts(layout.rows * ((layout.classes + kSoftmaxPart - 1) / kSoftmaxPart));
    over_parts(layout,
               [&](int64_t row, int64_t part, int64_t i) { parts[i] = kernels.part(loss.kernel(), args, row, part); });
    const SoftmaxSums total = kernels.forward(loss.kernel(), args, parts.data(), 0, layout.rows);
    if (args.grad) run_backward(loss, args);
    return total;
  }

  static void backward(const SoftmaxLoss& loss, const SoftmaxInputs& inputs, const Tensor& upstream,
                       const OptionalTensor& upstream_second, const Tensor& statistics, int64_t, Tensor& grad) {
    SoftmaxArgs args = {};
    inputs.fill(args);
    check_targets(loss, args);
    set_gradient(args, grad);
    args.statistics = const_cast<void*>(statistics.const_data_ptr());
    const Upstream read = read_upstream(upstream);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    Upstream second;
    if (upstream_second) {
      second = read_upstream(*upstream_second);
      args.upstream_second = second.tensor.const_data_ptr();
      args.upstream_second_stride = second.stride;
    }
    args.scale = 1.0 / number_at(statistics, statistics.numel() - 1);
    run_backward(loss, args);
  }
};

}  // namespace
void implement_softmax_on_cpu(torch::Library& m, const SoftmaxLoss& loss) { implement_softmax<SoftmaxOnCpu>(m, loss); }

}  // namespace fusedloss
