#include "../row_sums.h"

#include <algorithm>
#include <vector>

#include "chunks.h"

namespace fusedloss {
namespace {

void check(const RowSumsTotal& total) { TORCH_CHECK(total.bad_row < 0, "target out of range"); }  // torch's words

// The sum of the losses, in chunks of rows that are summed on their own and added in order.
double run(const RowSumsLoss& loss, bool backward, const RowSumsArgs& args) {
  const auto part = [&](int64_t begin, int64_t end) {
    return cpu_kernels().row_sums(loss.kernel(), backward, args, begin, end);
  };
  const int64_t rows = std::max<int64_t>(1, kChunk / args.columns), chunks = (args.rows + rows - 1) / rows;
  if (chunks == 1) {
    const RowSumsTotal total = part(0, args.rows);
    check(total);
    return total.loss;
  }
  std::vector<RowSumsTotal> totals(size_t(chunks), RowSumsTotal{0, -1});
  const int64_t grain = std::max<int64_t>(1, kElementsOfThread / (rows * args.columns));
  parallel_for(chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) totals[size_t(i)] = part(i * rows, std::min(args.rows, (i + 1) * rows));
  });
  double sum = 0;
  for (const RowSumsTotal& total : totals) {
    check(total);
    sum += total.loss;
  }
  return sum;
}

struct RowSumsOnCpu {
  static void forward(const RowSumsLoss& loss, const RowSumsInputs& inputs, int64_t reduction, Tensor& value) {
    RowSumsArgs args = {};
    inputs.fill(args);
    if (reduction == kNone) args.losses = value.mutable_data_ptr();
    const double sum = run(loss, false, args);
    if (reduction != kNone) set_number(value, 0, sum / inputs.divisor(reduction));
  }

  static void backward(const RowSumsLoss& loss, const RowSumsInputs& inputs, const Tensor& upstream, int64_t reduction,
                       const RowGradients& gradients) {
    RowSumsArgs args = {};
    inputs.fill(args);
    fill_gradients(args, gradients);
    const Upstream read = read_upstream(upstream);
    args.upstream = read.tensor.const_data_ptr();
    args.upstream_stride = read.stride;
    args.scale = 1 / inputs.divisor(reduction);
    run(loss, true, args);
  }
};

}  // namespace

void implement_row_sums_on_cpu(torch::Library& m, const RowSumsLoss& loss) {
  implement_row_sums<RowSumsOnCpu>(m, loss);
}

}  // namespace fusedloss
